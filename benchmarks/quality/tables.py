"""The tables of the page of results, and the words for what two variants differ by."""

import re
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from .experiments import Store, best_learning_rate, dev_losses, known, pending
from .figures import (
    ADALORA,
    CONSTANT,
    IA3,
    LORA,
    LORA_O_DOWN,
    MEAN,
    METHODS,
    PARA,
    PATH,
    RANDOM,
    TASK_ONLY,
    Difference,
    difference,
    difference_without_retraining,
    groups,
    mean_and_half_width,
    of_the_setting,
)
from .tasks import TASKS, split_of


FEWEST_SEEDS = 3
"""Below it the runs of mixtures and of other lengths have no verdict."""

CLAIMS = {
    "FanLoRA with `path` beats FanLoRA with random modules": (PATH, RANDOM),
    "FanLoRA with `path` beats LoRA on all modules": (PATH, LORA),
    "PARA beats IA3": (PARA, IA3),
    "PARA beats LoRA on all modules": (PARA, LORA),
    "PARA beats its own generators with a constant input": (PARA, CONSTANT),
}


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    """Returns a table, numbers to the right."""
    if not rows:
        return "*No runs yet.*\n"
    numbers = [all(re.match(r"[*+-]*\d|$", cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [columns, ["---:" if right else "---" for right in numbers], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def spread(values: pd.Series) -> str:
    """Writes a mean and its interval."""
    values = values.dropna()
    if values.empty:
        return ""
    mean, half_width = mean_and_half_width(values)
    return f"{mean:.3f}" + ("" if half_width is None else f" ± {half_width:.3f}")


def interval(found: Difference | None) -> str:
    """Returns a mean difference and its interval."""
    return "no runs to compare" if found is None else _columns(found)[0]


def says(found: Difference | None) -> str:
    """Returns a predicate that compares the first of two variants with the second."""
    if found is None:
        return "has no runs to compare"
    size, _, pairs, verdict = _columns(found)
    if verdict in ("better", "worse"):
        return f"is {verdict} by {size.lstrip('+-')} ({pairs} seeds)"
    return f"shows no difference ({size}, {pairs} seeds)" if found.pairs > 1 else f"has one pair ({size})"


def _columns(found: Difference) -> list[str]:
    half_width = "" if found.half_width is None else f" ± {found.half_width:.3f}"
    p = "" if found.p is None else f"{found.p:.2g}"
    return [f"{found.mean:+.3f}{half_width}", p, str(found.pairs), found.verdict]


def comparison(frame: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> str:
    """Returns how variants differ in loss, for each task and over the tasks."""
    rows = []
    for first, second in pairs:
        found = _by_task(frame, first, second)
        if len(found) > 1 and (mean := difference(frame, first, second)):
            found["mean over these tasks"] = mean
        rows += [[f"{first} vs. {second}", task, *_columns(one)] for task, one in found.items()]
    return markdown(["comparison", "task", "difference", "p", "pairs", "verdict"], rows)


def _by_task(frame: pd.DataFrame, first: str, second: str) -> dict[str, Difference]:
    found = {task: difference(frame[frame["task"] == task], first, second) for task in TASKS}
    return {task: one for task, one in found.items() if one is not None}


def claims(frame: pd.DataFrame, lost: pd.DataFrame) -> str:
    """Returns the outcome of each claim over all tasks and per task; `lost` has the losses after pruning in the searches."""
    kept = difference_without_retraining(lost[lost["task"] == "gloss"], "2 per layer")
    rows = (
        []
        if kept is None
        else [["Before retraining, the modules that `path` keeps beat a random choice", *_claim(kept), ""]]
    )
    for claim, (first, second) in CLAIMS.items():
        found = difference(frame, first, second)
        if found is not None:
            each = ", ".join(f"{task} {one.mean:+.3f}{'★' * (one.verdict in ('better', 'worse'))}"
                             for task, one in _by_task(frame, first, second).items())  # fmt: skip
            rows.append([claim, *_claim(found), each])
    return markdown(["claim", "difference", "seeds", "verdict", "task by task"], rows)


def _claim(found: Difference) -> list[str]:
    words = {"better": "holds", "worse": "the opposite", "no difference shown": "not shown"}
    size, _, pairs, verdict = _columns(found)
    return [size, pairs, words.get(verdict, verdict)]


def methods(frame: pd.DataFrame) -> str:
    """Returns what each method reached, a table for each budget and task."""
    parts = []
    for budget in sorted(frame["budget"].unique()):
        for task in TASKS:
            own = frame[(frame["task"] == task) & (frame["budget"] == budget)]
            if not own.empty:
                what = f"**{task}**, {budget:,} parameters"
                if TASKS[task].labels:
                    what += f"; accuracy of the most frequent answer: {split_of(task).commonest:.3f}"
                parts.append(f"{what}\n\n{_methods_of_a_task(own)}")
    return "\n".join(parts)


def _methods_of_a_task(frame: pd.DataFrame) -> str:
    rows = []
    for name in METHODS:
        own = frame[frame["variant"] == name]
        if not own.empty:
            parameters = f"{round(own['parameters'].mean()):,}"
            (rate,) = own["learning_rate"].unique()
            figures = [spread(own[column]) for column in ("loss", "accuracy", "rouge_l")]
            rows.append([name, parameters, f"{rate:g}", str(len(own)), *figures])
    columns = ["", "parameters", "lr", "seeds", "loss", "accuracy", "ROUGE-L"]
    kept = [index for index, column in enumerate(columns) if not column or any(row[index] for row in rows)]
    return markdown([columns[index] for index in kept], [[row[index] for index in kept] for row in rows])


FURTHER = [
    (PARA, IA3),
    (PARA, CONSTANT),
    (PARA, TASK_ONLY),
    (PARA, LORA),
    (TASK_ONLY, CONSTANT),
    (TASK_ONLY, IA3),
    (TASK_ONLY, LORA),
    (CONSTANT, IA3),
    (PATH, RANDOM),
    (PATH, LORA),
    (RANDOM, LORA),
    (LORA_O_DOWN, LORA),
]
"""What is compared on mixtures and after other numbers of steps."""


def so_far(found: Difference | None) -> str:
    """Returns a predicate as `says` does, without a verdict where there are fewer than three seeds."""
    if found is None or found.pairs >= FEWEST_SEEDS:
        return says(found)
    seeds = "one seed" if found.pairs == 1 else f"{found.pairs} seeds"
    return f"differs by {_each(found)} ({seeds}, too few for an interval)"


def _each(found: Difference) -> str:
    return " and ".join(f"{gap:+.3f}" for gap in found.gaps)


def reading(frame: pd.DataFrame, setting: str) -> str:
    """Returns how PARA compares in a setting, on its task or over its tasks, in a sentence."""
    own = frame[frame["setting"] == setting]
    whole = own[own["task"] == own["task"].iloc[0]]
    asked = {
        "IA3": IA3,
        "the same generators with a constant input": CONSTANT,
        "the same generators that read the task alone": TASK_ONLY,
        "LoRA on all modules": LORA,
    }
    found = [
        f"{so_far(one)} compared with {name}"
        for name, second in asked.items()
        if (one := difference(whole, PARA, second)) is not None
    ]
    return f"PARA {'; '.join(found)}." if found else "no comparison is finished yet."


def reading_by_task(frame: pd.DataFrame, setting: str) -> str:
    """Returns in a sentence how PARA compares with its generators with a constant input on each task of a setting."""
    own = frame[frame["setting"] == setting]
    found = {task: difference(own[own["task"] == task], PARA, CONSTANT) for task in TASKS}
    parts = [f"on *{task}* PARA {so_far(one)}" for task, one in found.items() if one is not None]
    return f"compared with a constant input, {'; '.join(parts)}." if parts else "no comparison is finished yet."


def trials(store: Store, where: str) -> str:
    """Returns PARA's variants with fewer than three seeds in a setting: their dev loss minus PARA's on the same seeds."""
    dev = {
        name: dev_losses(contents)[best_learning_rate(contents)]
        for (place, _, name), contents in groups(store).items()
        if place == where and name.startswith(PARA)
    }
    found = []
    for name, losses in dev.items():
        gaps = [loss - dev[PARA][seed] for seed, loss in losses.items() if seed in dev.get(PARA, {})]
        if gaps and len(losses) < FEWEST_SEEDS:
            found.append(f"{name.removeprefix(f'{PARA}, ')} {fmean(gaps):+.3f}")
    return "; ".join(found) or "none"


def further_methods(frame: pd.DataFrame) -> str:
    """Returns what the methods reached in one setting, with the accuracies of classifications in parentheses."""
    tasks = [task for task in (MEAN, *TASKS) if task in set(frame["task"])]
    rows = []
    for name in sorted(frame["variant"].unique(), key=_rank):
        own = frame[frame["variant"] == name]
        one = own[own["task"] == tasks[0]]
        (rate,) = one["learning_rate"].unique()
        cells = []
        for task in tasks:
            held_out = own[own["task"] == task]
            accuracy = held_out["accuracy"].mean()
            cells.append(spread(held_out["loss"]) + ("" if pd.isna(accuracy) else f" ({accuracy:.3f})"))
        parameters = f"{round(one['parameters'].mean()):,}"
        rows.append([name, parameters, f"{rate:g}", str(len(one)), *cells, f"{one['training_loss'].mean():.3f}"])
    return markdown(["", "parameters", "lr", "seeds", *tasks, "training, last third"], rows)


def _rank(name: str) -> tuple[int, str]:
    """Returns a key that sorts variants as `METHODS`, those of a method after it."""
    first = [index for index, method in enumerate(METHODS) if name.startswith(method.partition(",")[0])]
    return (METHODS.index(name) if name in METHODS else max(first)), name


def further_comparison(frame: pd.DataFrame) -> str:
    """Returns how methods differ in one setting: with at least three seeds an interval, else the difference of each seed."""
    tasks = [task for task in (MEAN, *TASKS) if task in set(frame["task"])]
    rows = []
    for first, second in FURTHER:
        found = [difference(frame[frame["task"] == task], first, second) for task in tasks]
        if found[0] is not None:
            few = found[0].pairs < FEWEST_SEEDS
            cells = [_each(one) if few else _columns(one)[0] for one in found if one]
            verdict = "too few seeds" if few else found[0].verdict
            rows.append([f"{first} vs. {second}", str(found[0].pairs), cells[0], verdict, *cells[1:]])
    return markdown(["comparison", "seeds", tasks[0], "verdict", *tasks[1:]], rows)


def off_budget(frame: pd.DataFrame) -> str:
    """Returns which variants of LoRA and PARA miss their budget by more than 5%, which whole ranks may not allow to meet."""
    found = []
    for (task, budget, name), own in frame.groupby(["task", "budget", "variant"]):
        off = own["parameters"].mean() / budget - 1
        if abs(off) > 0.05 and name not in (IA3, ADALORA) and " r = " not in name:
            found.append(f"{name} on {task} ({off:+.1%})")
    return "; ".join(found) or "none"


def learning_rates(store: Store) -> str:
    """Returns the dev losses that learning rates were chosen by."""
    rows = []
    for (where, budget, name), contents in groups(store).items():
        losses = dev_losses(contents)
        if len(losses) > 1:
            best = best_learning_rate(contents)
            cells = []
            for rate, values in losses.items():
                mark = "**" if rate == best else ""
                cells.append(f"{rate:g}: {mark}{spread(pd.Series(list(values.values())))}{mark} ({len(values)})")
            edge = "lower" if best == min(losses) else "upper" if best == max(losses) else "none"
            rows.append([f"{name}, {where}, {budget:,}", "; ".join(cells), edge])
    return markdown(["", "rate: dev loss (seeds)", "best rate at the edge"], rows)


def scores_before_retraining(lost: pd.DataFrame, store: Store) -> str:
    """Returns the loss with what each score keeps of each layer, and what the score costs."""
    lost = of_the_setting(lost)
    kept = lost[lost["choice"].str.endswith("per layer")]
    means = kept.pivot_table(index="score", columns="choice", values="loss", aggfunc="mean").sort_values("2 per layer")
    rows = [
        [str(score), *(f"{value:.3f}" if pd.notna(value) else "" for value in row), *_cost(store, str(score))]
        for score, *row in means.itertuples()
    ]
    return markdown(["kept", *means.columns, "CPU seconds", "calibration tokens"], rows)


def _cost(store: Store, score: str) -> tuple[str, str]:
    """Returns the seconds and the tokens that scoring took, nothing for a random choice."""
    if score == "random":
        return "", ""
    scored = store.scores("gloss", score)
    return f"{scored['cpu_seconds']:.0f}", f"{scored['num_tokens']:,}"


def path_before_retraining(lost: pd.DataFrame) -> str:
    """Returns how `path` differs from a random choice, over the searches."""
    searches = lost[lost["choice"].str.endswith("per layer") & (lost["task"] == "gloss")]
    rows = [
        [choice, *_columns(found)]
        for choice in sorted(searches["choice"].unique())
        if (found := difference_without_retraining(searches, choice)) is not None
    ]
    return markdown(["kept", "difference", "p", "pairs", "verdict"], rows)


def strategies_before_retraining(lost: pd.DataFrame) -> str:
    """Returns the loss with 60 modules that each score chooses in different ways."""
    lost = of_the_setting(lost)
    ways = ["2 per layer", "2 roles", "60 anywhere"]
    means = lost[lost["choice"].isin(ways)].pivot_table(index="score", columns="choice", values="loss")[ways]
    return markdown(
        ["kept", *ways], [[str(score), *(f"{loss:.3f}" for loss in row)] for score, *row in means.itertuples()]
    )


def overlaps(found: pd.DataFrame) -> str:
    """Returns how far choices by `path` agree with the one in use."""
    rows = [[what, f"{share:.0%}", f"{cpu:.0f}"] for what, share, cpu in found.itertuples(index=False)]
    return markdown(["`path` with", "modules in common", "CPU seconds"], rows)


def longer_run(content: dict[str, Any]) -> str:
    """Returns the losses of `examples/para_sft.py`: a row per method and learning rate, a column per seed."""
    runs = pd.DataFrame(content["runs"])
    keys = ["method", "parameters", "learning_rate"]
    losses = runs.pivot_table(index=keys, columns="seed", values="loss_after", sort=False)
    rows = []
    for (method, parameters, rate), values in zip(losses.index, losses.to_numpy(), strict=True):
        mean = "" if pd.isna(values).any() else f"{values.mean():.4f}"
        cells = ["" if pd.isna(value) else f"{value:.4f}" for value in values]
        rows.append([method, f"{parameters:,}", f"{rate:g}", *cells, mean])
    seeds = [f"seed {seed}" for seed in losses.columns]
    return markdown(["", "parameters", "learning rate", *seeds, "mean"], rows)


def costs(frame: pd.DataFrame) -> str:
    """Returns the CPU time and the memory of training."""
    rows = []
    for task in TASKS:
        lora = frame[(frame["task"] == task) & (frame["variant"] == LORA)]
        for name in METHODS:
            runs = frame[(frame["task"] == task) & (frame["variant"] == name)]
            if not runs.empty:
                ratio = "" if lora.empty else f"{runs['cpu_seconds'].median() / lora['cpu_seconds'].median():.2f}"
                low, high = runs["cpu_seconds"].min(), runs["cpu_seconds"].max()
                memory = f"{runs['memory'].median() / 2**30:.2f}"
                rows.append([name, task, f"{runs['cpu_seconds'].median():.0f} ({low:.0f}-{high:.0f})", ratio, memory])
    return markdown(["", "task", "CPU seconds", "relative to LoRA", "peak memory, GiB"], rows)


def training_steps(content: dict[str, Any]) -> str:
    """Returns the times and the memory of `benchmarks/training_steps.py`."""
    rows = []
    for result in content["results"]:
        low, high = result["ratio_quartiles"]
        ratio = f"{result['ratio']:.2f} ({low:.2f}-{high:.2f})"
        checkpointing = "yes" if result["checkpointing"] else "no"
        rows.append([result["method"], checkpointing, f"{result['parameters']:,}", ratio, f"{result['peak_mb']:,}"])
    return markdown(["", "checkpointing", "parameters", "step / LoRA's", "peak memory, MB"], rows)


def finished(files: Iterable[Path], store: Store) -> str:
    """Returns how much of each experiment is finished."""
    rows = []
    for file in files:
        runs, waiting = known([file], store)
        left = pending(runs, store)
        done = f"{len(runs) - len(left)} of {len(runs)}{' or more' if waiting else ''}"
        rows.append([file.name, done, left[0].label if left else ""])
    return markdown(["experiment", "finished", "next"], rows)
