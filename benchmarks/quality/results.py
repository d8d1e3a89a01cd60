"""Makes docs/results.md, its tables and its pictures from the finished runs; run it again as more arrive.

python benchmarks/quality/results.py
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from jinja2 import Environment, FileSystemLoader, StrictUndefined


sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import figures, plots, tables
from quality.experiments import LORA_RANK_2, Run, Store
from quality.tasks import MIXTURES, TASKS, Split


HERE = Path(__file__).parent
ROOT = HERE.parents[1]


PAGES = ("results.md", "results-tables.md")


def pages(store: Store, files: list[Path]) -> dict[str, str]:
    """Returns the pages by name: their templates, which have all of their text, with the figures filled in."""
    frame = figures.table(store)
    small = figures.smaller_budget(frame)
    runs, searches = store.load("run"), store.load("search")
    lost = figures.pruned(store)
    further = figures.smaller_budget(figures.further(store))

    def picture(name: str, alt: str) -> str:
        return f"![{alt}](images/results-{name}.png)\n" if plots.panels(small, plots.compared(small)[name]) else ""

    served = json.loads((ROOT / "benchmarks/results/serving-cpu.json").read_text())["results"]
    values: dict[str, Any] = {
        "store": store,
        "files": files,
        "frame": frame,
        "small": small,
        "larger": frame[frame["budget"] != LORA_RANK_2],
        "models": ", ".join(sorted({content["base_model"] for content in runs + searches})),
        "machines": "; ".join(sorted({_machine(content["machine"]) for content in runs + searches})),
        "further": further,
        "of_three": further[(further["setting"] == "three, 120 steps") & (further["task"] == figures.MEAN)],
        "usual_steps": Run.steps,
        "most_steps": max(run.steps for run in store.finished()),
        "mixtures": MIXTURES,
        "split": Split("", next(iter(TASKS.values()))),
        "budget": LORA_RANK_2,
        "agreement": figures.stability(store),
        "lost": lost,
        "limits": figures.of_the_setting(lost).groupby("choice")["loss"].mean(),
        "parts_of_para": [(figures.PARA, name) for name in plots.compared(small)["para"][1:]],
        "picture": picture,
        "step": {
            (result["method"], result["tenants"]): f"{result['ratio']:.2f}"
            for result in served
            if result["measure"] == "decode"
        },
        "steps_timed": json.loads((ROOT / "benchmarks/results/training-steps-cpu.json").read_text()),
        "example": json.loads((ROOT / "benchmarks/results/para-sft.json").read_text()),
    }
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.globals |= vars(figures) | vars(tables)
    return {name: environment.get_template(f"{name}.jinja").render(values) for name in PAGES}


def _machine(facts: dict[str, str | int]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "transformers", "peft"))
    where = (
        facts["accelerator"] if facts["accelerator"] != "none" else f"{facts['processor']}, {facts['threads']} thread"
    )
    return f"{where}, {versions}"


def main(
    results: Annotated[Path, typer.Option(help="Folder of the finished runs")] = ROOT / "benchmarks/results/quality",
    docs: Annotated[Path, typer.Option(help="Folder of the pages")] = ROOT / "docs",
) -> None:
    """Writes the pages and the pictures."""
    store = Store(results)
    try:
        store.scores("gloss", "path")
    except LookupError as error:
        raise typer.BadParameter(f"{results}: {error}") from error
    plots.draw(store, docs / "images")
    for name, text in pages(store, sorted((HERE / "experiments").glob("*.yaml"))).items():
        (docs / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
