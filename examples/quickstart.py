"""Both methods on a real chat model and real text, in about three minutes on two CPU cores.

(1) LoRA on all linear layers is trained on WordNet definitions, and the best two modules per layer are found: the FanLoRA
setting; (2) a new adapter on this setting learns the sentiment of movie reviews, next to LoRA on all layers with the same
number of parameters; (3) PARA learns both tasks; (4) the adapters of each method and the base model answer in one batch,
and a decoding step is timed next to PEFT's LoRA.

    python examples/quickstart.py
    python examples/quickstart.py --full
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import assets
import datasets
import quickstart_full
import torch
import transformers
import typer
from datasets import Dataset
from multi_tenant import answers
from peft import PeftModel, get_peft_model
from quickstart_full import KEEP, Run, equal_configs, random_setting
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn
from rich.table import Table
from torch.utils.data import DataLoader
from training import Losses, losses
from transformers import AutoTokenizer, ProgressCallback, TrainerCallback

from peft_fanlora import FanLoraConfig, ImportanceScores, ParaConfig, export_lora
from peft_fanlora.timing import BASE, Contestant, Stopwatch, decode_steps, summaries, twin


BATCH_SIZE = 4
LEARNING_RATE = 2e-3
PARA_LEARNING_RATE = 5e-3
LONGEST = 120
"""Characters of a row: short rows keep the training steps short."""
NUM_HELD_OUT = 24
NUM_CALIBRATION = 8
NUM_POINTS = 4
"""Points of the `path` score's integral."""
RANDOM_DRAWS = 3
TENANTS = 8
ROUNDS = 16
PROMPT_LENGTH = 16
NEW_TOKENS = 16

Advance = Callable[[], None]
Found = dict[str, Any]

console = Console(highlight=False)


class Steps(TrainerCallback):
    """Advances a progress bar with each training step."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance

    def on_step_end(self, *call: Any, **values: Any) -> None:
        self.advance()


@contextmanager
def act(title: str, why: str, total: int) -> Iterator[Advance]:
    """Prints what happens and why, and shows one progress bar; the value advances it by one of `total`."""
    console.print(f"\n[bold]{title}[/bold]\n{why}")
    with Progress(BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)


def counted(batches: Iterable[Any], advance: Advance) -> Iterator[Any]:
    """Yields batches, and advances a progress bar after each."""
    for batch in batches:
        yield batch
        advance()


def short_rows(rows: list[assets.Row], number: int) -> Dataset:
    """Returns the first rows with at most `LONGEST` characters."""
    short = (row for row in rows if sum(len(m["content"]) for part in row.values() for m in part) <= LONGEST)
    return Dataset.from_list(list(islice(short, number)))


def train(
    run: Run, model: PeftModel, rows: Dataset, steps: int, learning_rate: float, advance: Advance
) -> tuple[DataLoader, DataLoader]:
    """Trains an adapter; returns the batches of the held-out and of the calibration rows, the first ones of `rows`."""
    first, second = NUM_HELD_OUT, NUM_HELD_OUT + NUM_CALIBRATION
    trainer = run.trainer(
        model,
        steps,
        rows.select(range(second, len(rows))),
        learning_rate=learning_rate,
        batch_size=BATCH_SIZE,
        held_out=rows.select(range(first)),
        calibration=rows.select(range(first, second)),
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(Steps(advance))
    trainer.train()
    return trainer.get_eval_dataloader("held_out"), trainer.get_eval_dataloader("calibration")


def num_batches(rows: int) -> int:
    return -(-rows // BATCH_SIZE)


def find_setting(run: Run, rows: Dataset, steps: int) -> tuple[ImportanceScores, Losses, Found]:
    """Act 1: writes the setting, its heat map and the pruned adapter; returns the scores and the base model's losses."""
    total = steps + num_batches(NUM_CALIBRATION) + (3 + RANDOM_DRAWS) * num_batches(NUM_HELD_OUT)
    why = (
        "LoRA on all linear layers learns WordNet definitions. Each module is scored by its share of the gain, and the "
        f"best {KEEP} of each layer are kept, without more training. A good score beats a random choice of {KEEP}."
    )
    with act("1. Which modules matter?", why, total) as advance:
        model = get_peft_model(run.base(), FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
        held_out, calibration = train(run, model, rows, steps, LEARNING_RATE, advance)
        model.save_pretrained(run.output / "lora-on-all-modules")
        with model.disable_adapter():
            before = losses(model, counted(held_out, advance))
        whole = losses(model, counted(held_out, advance))
        scores = model.score_modules(counted(calibration, advance), num_points=NUM_POINTS, progress=False)
        setting = model.prune_modules(scores.select(keep=KEEP))
        setting.save_pretrained(run.output / "setting")
        scores.plot(run.output / "importance.png", setting)
        model.save_pretrained(run.output / "fanlora/definitions")
        kept = losses(model, counted(held_out, advance))
        draws = []
        for draw in range(RANDOM_DRAWS):
            other = PeftModel.from_pretrained(run.base(), run.output / "lora-on-all-modules")
            other.prune_modules(random_setting(other, scores, draw))
            draws.append(losses(other, counted(held_out, advance)))
    found = {
        "modules": len(scores),
        "kept": len(setting.kept),
        "loss": {
            "base model": before.mean,
            "all modules": whole.mean,
            "kept": kept.mean,
            "random": [draw.mean for draw in draws],
        },
        "kept - random": kept.minus(*draws),
    }
    lowest, highest = min(found["loss"]["random"]), max(found["loss"]["random"])
    console.print(
        f"Held-out loss: {before.mean:.2f} before training, {whole.mean:.2f} with all {len(scores)} modules, "
        f"{kept.mean:.2f} with the {len(setting.kept)} kept ones, {lowest:.2f} to {highest:.2f} with {RANDOM_DRAWS} random "
        "choices."
    )
    return scores, before, found


def reuse_setting(run: Run, scores: ImportanceScores, rows: Dataset, steps: int) -> tuple[Losses, Found]:
    """Act 2: writes FanLoRA's adapter, also as plain LoRA, and LoRA's; returns the base model's losses."""
    why = (
        "A new adapter for movie reviews uses only the kept modules, at a higher rank: as many parameters as LoRA on all "
        "layers. The search is paid once; what it buys is cheaper serving (act 4)."
    )
    configs = equal_configs(run.base(), run.output / "setting", scores)
    folders = {"FanLoRA": "fanlora/reviews", "LoRA on all modules": "lora/reviews"}
    total = len(folders) * (steps + num_batches(NUM_HELD_OUT)) + num_batches(NUM_HELD_OUT)
    results: dict[str, Losses] = {}
    parameters = {}
    with act("2. The setting on another task", why, total) as advance:
        for name, folder in folders.items():
            model = get_peft_model(run.base(), configs[name])
            held_out, _ = train(run, model, rows, steps, LEARNING_RATE, advance)
            if not results:
                with model.disable_adapter():
                    results["base model"] = losses(model, counted(held_out, advance))
            results[name] = losses(model, counted(held_out, advance))
            parameters[name] = model.get_nb_trainable_parameters()[0]
            model.save_pretrained(run.output / folder)
            if name == "FanLoRA":
                export_lora(model, run.output / "plain-lora")
    gap = results["FanLoRA"].minus(results["LoRA on all modules"])
    console.print(
        f"Held-out loss: {results['base model'].mean:.2f} before training, {results['FanLoRA'].mean:.3f} with FanLoRA, "
        f"{results['LoRA on all modules'].mean:.3f} with LoRA."
    )
    found = {name: result.mean for name, result in results.items()}
    return results["base model"], {"loss": found, "parameters": parameters, "FanLoRA - LoRA": gap}


def train_para(run: Run, tasks: dict[str, Dataset], before: dict[str, Losses], steps: int) -> Found:
    """Act 3: writes an adapter for each task. `before` has the base model's losses."""
    why = (
        "PARA learns both tasks from prompts and completions, which show it where each prompt ends. A generator in each "
        "block reads the prompt once; after that, a token costs three multiplications per block."
    )
    found = {}
    total = len(tasks) * (steps + num_batches(NUM_HELD_OUT))
    with act("3. PARA", why, total) as advance:
        for name, rows in tasks.items():
            model = get_peft_model(run.base(), ParaConfig(task_type="CAUSAL_LM"))
            held_out, _ = train(run, model, rows, steps, PARA_LEARNING_RATE, advance)
            after = losses(model, counted(held_out, advance))
            model.save_pretrained(run.output / "para" / name)
            change = after.minus(before[name])
            found[name] = {"before": before[name].mean, "after": after.mean, "after - before": change}
    changes = (f"{one['before']:.2f} -> {one['after']:.2f} on {name}" for name, one in found.items())
    console.print(f"Held-out loss: {', '.join(changes)}.")
    return found


def serve(run: Run, tasks: dict[str, Dataset], rounds: int) -> Found:
    """Act 4: answers in one batch per method, and the time of a decoding step."""
    why = (
        "Each method serves its adapters and the base model in one batch: the rows of a batch name their adapters. Then a "
        f"decoding step of a batch with {TENANTS} tenants is timed in turns with PEFT's LoRA and the base model."
    )
    base = run.base().to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.base_model, padding_side="left")
    prompts = {name: rows[0]["prompt"] for name, rows in tasks.items()}
    names = [f"{name}-{copy}" for copy in range(TENANTS // len(tasks)) for name in tasks]
    replies: dict[str, list[str]] = {}
    contestants = [Contestant(BASE, base), Contestant(f"{BASE}, again", twin(base))]
    with act("4. Many tenants in one batch", why, rounds) as advance:
        for method, label in (("fanlora", "FanLoRA"), ("para", "PARA")):
            model = tenants(base, {name: run.output / method / name.partition("-")[0] for name in names})
            rows = [row for name in tasks for row in (f"{name}-0", "__base__")]
            conversations = [prompts[name] for name in tasks for _ in range(2)]
            replies[label], _ = answers(model, tokenizer, conversations, rows, NEW_TOKENS)
            contestants.append(Contestant(label, model, {"adapter_names": names}))
        for label, folder in (
            ("PEFT's LoRA, all modules", "lora/reviews"),
            ("PEFT's LoRA, same modules", "plain-lora"),
        ):
            model = tenants(base, dict.fromkeys(names, run.output / folder))
            contestants.append(Contestant(label, model, {"adapter_names": names}))
        device = str(base.device)
        vocabulary = base.config.vocab_size
        seconds = decode_steps(
            contestants,
            counted(range(rounds), advance),
            lambda: torch.randint(0, vocabulary, (len(names), PROMPT_LENGTH), device=device),
            Stopwatch(device),
        )
    table = Table("prompt", BASE, "FanLoRA", "PARA", show_lines=True)
    for place, messages in enumerate(prompts.values()):
        own, of_base = 2 * place, 2 * place + 1
        cells = (messages[-1]["content"], replies["FanLoRA"][of_base], replies["FanLoRA"][own], replies["PARA"][own])
        table.add_row(*map(escape, cells))
    console.print(table)
    return {"answers": replies, "tenants": len(names), "decoding": summaries(seconds)}


def tenants(base: Any, folders: dict[str, Path]) -> PeftModel:
    """Returns a model with one adapter per folder, whose base model shares the weights of `base`."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(twin(base), folder, adapter_name=first)
    for name, other in others:
        model.load_adapter(other, name)
    return model.eval()


def signed(difference: tuple[float, float]) -> str:
    return f"{difference[0]:+.3f} ± {difference[1]:.3f}"


def show_results(run: Run, found: dict[str, Found], minutes: float) -> None:
    """Prints what was found, the written files and the next commands."""
    modules, task, para, serving = (found[name] for name in ("modules", "task", "para", "serving"))
    better = modules["kept - random"][0] + modules["kept - random"][1] < 0
    differs = abs(task["FanLoRA - LoRA"][0]) > task["FanLoRA - LoRA"][1]
    console.print(
        f"\n[bold]What this run found[/bold] ({minutes:.1f} minutes, one seed; ± is a 95% interval over held-out rows)"
    )
    facts = Table(show_header=False, box=None, padding=(0, 1))
    facts.add_row(
        "Modules",
        f"{modules['kept']} of {modules['modules']} kept. Loss minus that of random choices, without more training: "
        f"{signed(modules['kept - random'])}, {'better' if better else 'not shown to be better'}.",
    )
    facts.add_row(
        "New task",
        f"Loss of FanLoRA minus that of LoRA with as many parameters: {signed(task['FanLoRA - LoRA'])}, "
        + ("a difference in this short run" if differs else "no difference shown")
        + ("; over several seeds, none is shown (docs/results.md)." if differs else "."),
    )
    facts.add_row(
        "PARA",
        "Change of loss: "
        + ", ".join(f"{signed(one['after - before'])} on {name}" for name, one in para.items())
        + ".",
    )
    ratios = (
        f"{one['method']} {one['ratio']:.2f} ({one['ratio_quartiles'][0]:.2f}-{one['ratio_quartiles'][1]:.2f})"
        for one in serving["decoding"]
        if one["method"] != BASE
    )
    title = f"Time of a step with {serving['tenants']} tenants / base model (quartiles)"
    facts.add_row("Decoding", f"{title}: {', '.join(ratios)}.")
    console.print(facts)
    console.print(f"\n[bold]Files in {run.output}/[/bold]")
    files = Table(show_header=False, box=None, padding=(0, 1))
    files.add_row("importance.png", "heat map of the scores")
    files.add_row("setting/", "the FanLoRA setting")
    files.add_row("fanlora/, para/", "adapters for definitions and reviews")
    files.add_row("plain-lora/", "fanlora/reviews as plain LoRA, for other engines")
    files.add_row("results.json", "all figures")
    console.print(files)
    command = os.path.relpath(Path(sys.executable).with_name("peft-fanlora"))
    console.print("\n[bold]Go on with[/bold]")
    for line in (
        f"{command} show {run.output / 'setting'}",
        f"{command} export {run.output / 'fanlora/definitions'} my-plain-lora",
        f"{command} bench {run.base_model} --setting {run.output / 'setting'} --tenants 8",
    ):
        console.print(f"  {line}", soft_wrap=True)


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    output: Annotated[Path, typer.Option(help="Output folder")] = Path("quickstart-output"),
    full: Annotated[bool, typer.Option("--full", help="FanLoRA alone, trained longer and compared with more")] = False,
    steps: Annotated[int | None, typer.Option(help="Training steps of the first adapter")] = None,
    task_steps: Annotated[int | None, typer.Option(help="Training steps of each other adapter")] = None,
    seed: Annotated[int, typer.Option(help="Seed of all runs")] = 0,
) -> None:
    """Runs both methods and prints the results."""
    started = time.perf_counter()
    run = Run(model or str(assets.model_folder()), output, seed)
    if full:
        quickstart_full.compare(run, steps or 40, task_steps or 20)
        return
    console.print("The model and the texts are loaded.")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    steps, task_steps = steps or 10, task_steps or 9
    needed = NUM_HELD_OUT + NUM_CALIBRATION + max(steps, task_steps) * BATCH_SIZE
    tasks = {"definitions": short_rows(assets.glosses(), needed), "reviews": short_rows(assets.sentiment(), needed)}
    before: dict[str, Losses] = {}
    scores, before["definitions"], modules = find_setting(run, tasks["definitions"], steps)
    before["reviews"], task = reuse_setting(run, scores, tasks["reviews"], task_steps)
    para = train_para(run, tasks, before, task_steps)
    found = {"modules": modules, "task": task, "para": para, "serving": serve(run, tasks, ROUNDS)}
    minutes = (time.perf_counter() - started) / 60
    settings = {"seed": seed, "steps": steps, "task_steps": task_steps, "minutes": round(minutes, 2)}
    (output / "results.json").write_text(json.dumps({**settings, **found}, indent=2) + "\n")
    show_results(run, found, minutes)


if __name__ == "__main__":
    typer.run(main)
