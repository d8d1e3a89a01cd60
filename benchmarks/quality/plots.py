"""The pictures of docs/results.md and its tables, one for each question that has runs."""

from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt

from .experiments import Store
from .figures import LORA, METHODS, OWN, PARA, PATH, RANDOM, of_the_setting, pruned, smaller_budget, stability, table


mpl.use("Agg")


def draw(store: Store, folder: Path) -> None:
    """Draws all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    frame = smaller_budget(table(store))
    for name, variants in compared(frame).items():
        seeds(frame, variants, "loss", "test loss, nats per token", folder / f"results-{name}.png")
    seeds(frame, METHODS, "cpu_seconds", "CPU seconds of training", folder / "results-cost.png")
    lost = of_the_setting(pruned(store))
    by_score(lost, ["1 per layer", "2 per layer", "3 per layer"], "-", folder / "results-pruned.png")
    by_score(lost, ["2 per layer", "2 roles", "60 anywhere"], "", folder / "results-strategy.png")
    overlaps(stability(store), folder / "results-stability.png")


def compared(frame: pd.DataFrame) -> dict[str, list[str]]:
    """Returns the variants of each picture of losses."""
    found = sorted(frame["variant"].unique())
    return {
        "methods": METHODS,
        "settings": [
            PATH,
            *(name for name in found if name.startswith("FanLoRA") and "own" not in name and name != PATH),
        ],
        "transfer": [OWN, PATH, RANDOM, LORA],
        "para": [PARA, *(name for name in found if name.startswith("PARA, "))],
    }


def panels(frame: pd.DataFrame, variants: list[str]) -> list[str]:
    """Returns the tasks in which the first variant has runs, and more than half of them all."""
    own = frame[frame["variant"].isin(variants)]
    least = max(2, own["variant"].nunique() // 2 + 1)
    tasks = own.groupby("task", sort=False)["variant"]
    return [str(task) for task, names in tasks if variants[0] in set(names) and names.nunique() >= least]


def seeds(frame: pd.DataFrame, names: list[str], column: str, label: str, path: Path) -> None:
    """Draws a point a seed and a line at the mean, a row a variant and a panel a task."""
    own = frame[frame["variant"].isin(names)]
    tasks = panels(frame, names)
    if not tasks:
        return
    figure, grid = plt.subplots(
        1,
        len(tasks),
        figsize=(2 + 3 * len(tasks), 1 + 0.35 * len(names)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    rows = [name for name in names if name in set(own["variant"])]
    for axes, task in zip(grid[0], tasks, strict=True):
        for row, name in enumerate(rows):
            values = own[(own["task"] == task) & (own["variant"] == name)]
            axes.scatter(values[column], [row] * len(values), s=18, alpha=0.7)
            if len(values):
                axes.plot([values[column].mean()] * 2, [row - 0.3, row + 0.3], color="black")
        axes.set_title(task)
        axes.set_xlabel(label)
        axes.grid(axis="x", alpha=0.3)
    grid[0][0].set_yticks(range(len(rows)), rows)
    grid[0][0].invert_yaxis()
    _save(figure, path)


def by_score(lost: pd.DataFrame, choices: list[str], line: str, path: Path) -> None:
    """Draws the loss without retraining against what is kept, a colour a score."""
    means = lost.pivot_table(index="choice", columns="score", values="loss", aggfunc="mean").loc[choices]
    means = means.dropna(axis="columns", how="all")
    figure, axes = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for score in means.loc["2 per layer"].sort_values(ascending=False).index:
        axes.plot(
            means.index,
            means[score],
            marker="o",
            linestyle=line,
            label=score,
            color="grey" if score == "random" else None,
        )
    everything = lost[lost["choice"] == "all"]["loss"].mean()
    axes.axhline(everything, color="black", linewidth=1, linestyle="--", label="all modules")
    axes.set_xlabel("modules kept")
    axes.set_ylabel("loss on dev rows, nats per token")
    axes.set_title("Definitions, without retraining")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    _save(figure, path)


def overlaps(found: pd.DataFrame, path: Path) -> None:
    """Draws how far choices agree."""
    if found.empty:
        return
    figure, axes = plt.subplots(figsize=(6, 1 + 0.3 * len(found)), layout="constrained")
    axes.barh(found["what"], found["share"])
    axes.axvline(2 / 7, color="black", linewidth=1, linestyle="--", label="two random choices")
    axes.set_xlim(0, 1)
    axes.set_xlabel("modules in common")
    axes.invert_yaxis()
    axes.legend()
    _save(figure, path)


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
