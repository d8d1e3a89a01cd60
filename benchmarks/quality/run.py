"""Runs experiments, each run once; what is finished stays, and a run that was killed starts again.

python benchmarks/quality/run.py  # all that is not finished, in order
python benchmarks/quality/run.py benchmarks/quality/experiments/5-tasks.yaml --device cuda
"""

import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm


sys.path.insert(0, str(Path(__file__).parents[1]))

from quality.experiments import Search, Store, known, pending


HERE = Path(__file__).parent
RESULTS = HERE.parent / "results" / "quality"


def main(
    experiments: Annotated[list[Path] | None, typer.Argument(help="Experiment files [default: all]")] = None,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    results: Annotated[Path, typer.Option(help="Folder of the results, one for each base model")] = RESULTS,
    device: Annotated[str, typer.Option(help="Where to train: cpu or cuda")] = "cpu",
    at_most: Annotated[int | None, typer.Option(help="Stop after so many runs")] = None,
) -> None:
    """Runs what is not finished; the progress bar counts runs."""
    files = experiments or sorted((HERE / "experiments").glob("*.yaml"))
    store = Store(results)
    done = 0
    bench = None
    with tqdm(desc="Runs", unit="run", smoothing=0.1) as progress:
        while done != at_most:
            runs, waiting = known(files, store)
            todo = pending(runs, store)
            run = store.claim(todo)
            if run is None:
                break
            if run in store.finished():  # another process finished it after `todo` was made
                continue
            progress.total = done + len(todo)
            progress.set_postfix_str(run.label)
            if bench is None:  # what needs torch is only loaded when there is something to do
                import assets

                from quality.search import search
                from quality.training import Bench, run_once

                bench = Bench(model or str(assets.model_folder()), device, store)
            store.save(runs[run], run, search(bench, run) if isinstance(run, Search) else run_once(bench, run))
            done += 1
            progress.update()
    runs, waiting = known(files, store)
    left = pending(runs, store)
    if waiting and not left:
        raise typer.BadParameter(
            "the next run has no learning rate, and no grid of its method is among the experiments"
        )
    others = "; another process is making the next one" if left and done != at_most else ""
    print(f"{done} runs done, {len(left)}{' and more' if waiting else ''} to go{others}")


if __name__ == "__main__":
    typer.run(main)
