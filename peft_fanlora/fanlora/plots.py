"""The heat map of scores by layer and role, and the trade-off of cost and score. Needs matplotlib."""

import io
import os
from collections.abc import Collection, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ..sharing.writing import staged
from .modules import ModuleName
from .tradeoff import Choice


_LARGEST_SIDE = 80
"""In inches, enough for 360 layers. Limits the memory of the image for any setting."""


def plot_modules(
    scores: Mapping[ModuleName, float], *, path: str | os.PathLike[str], title: str, kept: Collection[ModuleName] = ()
) -> None:
    """Draws a heat map with one panel per stack: layers on the x axis, roles on the y axis, the score as colour.

    A few modules often score far above the rest, so the colour scale is symmetric-logarithmic: linear up to a tenth of
    the largest score, logarithmic above.

    Args:
        scores: the modules' scores.
        path: the image file.
        title: the title above the panels.
        kept: modules to mark with a dot, those of a setting.
    """
    file = _with_suffix(path)
    _write(_modules(tuple(scores.items()), tuple(kept), title, file.suffix), file)


@lru_cache(maxsize=4)  # each checkpoint of a run has the same heat map, which takes half a second to draw
def _modules(
    items: tuple[tuple[ModuleName, float], ...], kept: tuple[ModuleName, ...], title: str, suffix: str
) -> bytes:
    """Returns the image of `plot_modules`."""
    scores = dict(items)
    stacks = list(dict.fromkeys(module.stack for module in scores))
    roles = {stack: list(dict.fromkeys(m.role for m in scores if m.stack == stack)) for stack in stacks}
    depths = {stack: 1 + max(m.layer for m in scores if m.stack == stack) for stack in stacks}
    figure = Figure(
        figsize=(
            min(3.5 + 0.22 * max(depths.values()), _LARGEST_SIDE),
            min(1.4 + sum(0.6 + 0.3 * len(roles[stack]) for stack in stacks), _LARGEST_SIDE),
        ),
        layout="constrained",
    )
    panels = figure.subplots(
        len(stacks), squeeze=False, gridspec_kw={"height_ratios": [len(roles[stack]) for stack in stacks]}
    )
    limit = max(map(abs, scores.values())) or 1.0
    norm = SymLogNorm(linthresh=limit / 10, vmin=min(0.0, *scores.values()), vmax=limit)
    for stack, (axes,) in zip(stacks, panels, strict=True):
        grid = [[float("nan")] * depths[stack] for _ in roles[stack]]
        for module, score in scores.items():
            if module.stack == stack:
                grid[roles[stack].index(module.role)][module.layer] = score
        image = axes.imshow(grid, aspect="auto", cmap="viridis", norm=norm)
        axes.set_yticks(range(len(roles[stack])), roles[stack], fontsize=8)
        step = 1 if depths[stack] <= 40 else 5
        axes.set_xticks(range(0, depths[stack], step))
        axes.tick_params(axis="x", labelsize=7)
        axes.set_xlabel("layer" if len(stacks) == 1 else f"layer of {stack}", fontsize=8)
        dots = [(module.layer, roles[stack].index(module.role)) for module in kept if module.stack == stack]
        if dots:
            axes.scatter(*zip(*dots, strict=True), s=16, color="white", edgecolor="black", linewidth=0.8)
        figure.colorbar(image, ax=axes, label="score", pad=0.01)
    figure.suptitle(title, fontsize=10)
    return _image(figure, suffix)


def plot_tradeoff(
    curves: Mapping[str, Sequence[Choice]],
    *,
    path: str | os.PathLike[str],
    title: str,
    cost: str,
    marked: Choice | None = None,
) -> None:
    """Draws the cost of choices on the x axis and their share of the scores on the y axis, one line per strategy.

    Args:
        curves: the choices of each strategy, from few modules to many.
        path: the image file.
        title: the title.
        cost: what the cost is.
        marked: a choice to mark with a star.
    """
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    for marker, (label, choices) in zip(".osD^", curves.items(), strict=False):
        points = [(choice.cost, choice.share) for choice in choices]
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=4, linewidth=1.2, label=label)
    if marked is not None:
        axes.scatter(
            marked.cost,
            marked.share,
            s=150,
            marker="*",
            color="white",
            edgecolor="black",
            zorder=3,
            label="this setting",
        )
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel(cost, fontsize=9)
    axes.set_ylabel("share of the summed scores that is kept", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.suptitle(title, fontsize=10)
    file = _with_suffix(path)
    _write(_image(figure, file.suffix), file)


def _with_suffix(path: str | os.PathLike[str]) -> Path:
    """Returns the path, with the suffix of matplotlib's default format if it has none."""
    return Path(path) if Path(path).suffix else Path(f"{os.fspath(path)}.png")


def _image(figure: Figure, suffix: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=suffix.removeprefix("."), dpi=150)
    return buffer.getvalue()


def _write(image: bytes, file: Path) -> None:
    with staged(file.parent) as stage:
        (stage / file.name).write_bytes(image)
