"""The heat map of scores by layer and role. Needs matplotlib."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path

from matplotlib.colors import SymLogNorm
from matplotlib.figure import Figure

from ..sharing.writing import staged
from .modules import ModuleName


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
    with staged(Path(path).parent) as stage:
        figure.savefig(stage / Path(path).name, dpi=150)
