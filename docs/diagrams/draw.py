"""Draws the pictures of both methods into docs/images/, as SVG.

    python docs/diagrams/draw.py [FOLDER]

Each stands on a light card of its own, so that it can be read on light and on dark pages.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch


IMAGES = Path(__file__).parent.parent / "images"

INK, MUTED, LINE, CARD, EMPTY = "#1f2430", "#5b6472", "#ccd2dc", "#fbfbfd", "#e9ebf1"
LORA, ORANGE, TEAL = "#4253c8", "#d9772b", "#17866a"

ROLES = ("Q", "K", "V", "O", "G", "U", "D")
# Scores of six layers of an imagined model: how much each module adds, from 0 to 1.
SCORES = (
    (0.10, 0.08, 0.45, 0.20, 0.30, 0.62, 0.35),
    (0.12, 0.10, 0.52, 0.28, 0.22, 0.48, 0.40),
    (0.30, 0.15, 0.66, 0.25, 0.35, 0.58, 0.42),
    (0.22, 0.12, 0.44, 0.36, 0.40, 0.70, 0.64),
    (0.18, 0.20, 0.38, 0.58, 0.34, 0.82, 0.50),
    (0.15, 0.10, 0.40, 0.45, 0.48, 0.95, 0.78),
)
KEPT = tuple(tuple(score in sorted(layer)[-2:] for score in layer) for layer in SCORES)


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """Makes a drawing area of width x height units, ten to the inch, with the card."""
    figure = Figure(figsize=(width / 10, height / 10))
    figure.patch.set_alpha(0)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    box(axes, 0.4, 0.4, width - 0.8, height - 0.8, fill=CARD, edge=LINE, corner=2)
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    *,
    fill: str,
    edge: str | None = None,
    corner: float = 0.6,
) -> None:
    style = f"round,pad=0,rounding_size={corner}"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge or fill, lw=1))


def label(axes: Axes, x: float, y: float, text: str, size: float = 10, colour: str = INK, **style: str) -> None:
    axes.text(x, y, text, fontsize=size, color=colour, **{"ha": "center", "va": "center", **style})


def named_box(
    axes: Axes, x: float, y: float, width: float, height: float, text: str, fill: str, size: float = 11
) -> None:
    """A box with its name in the middle, white on strong colours."""
    box(axes, x, y, width, height, fill=fill)
    colour = "white" if sum(to_rgb(fill)) < 1.8 else INK
    label(axes, x + width / 2, y + height / 2, text, size, colour)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = MUTED, bend: float = 0
) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 11, "connectionstyle": f"arc3,rad={bend}"}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, lw=1.4, shrinkA=0, shrinkB=0, **style))


def mixed(colour: str, share: float) -> tuple[float, ...]:
    """Returns `share` of a colour on the grey of an empty module."""
    return tuple(
        share * strong + (1 - share) * weak for strong, weak in zip(to_rgb(colour), to_rgb(EMPTY), strict=True)
    )


def modules(
    axes: Axes, x: float, y: float, fill: Callable[[int, int], object], cell: float = 3.4, names: bool = True
) -> None:
    """A grid of modules, a row for each layer, from the first layer at the bottom up."""
    for layer in range(len(SCORES)):
        for role in range(len(ROLES)):
            box(axes, x + role * cell, y + layer * cell, 0.84 * cell, 0.84 * cell, fill=fill(layer, role))  # type: ignore[arg-type]
    if names:
        for role, name in enumerate(ROLES):
            label(axes, x + (role + 0.42) * cell, y - 1.5, name, 10, MUTED)
        label(axes, x - 1.3, y + len(SCORES) * cell / 2 - 0.3, "layers", 9.5, MUTED, rotation="vertical")


def fanlora() -> Figure:
    figure, axes = canvas(86, 72)

    def step(x: float, y: float, letter: str, title: str, line: str) -> None:
        label(axes, x, y, f"({letter})", 13, LORA, ha="left", weight="bold")
        label(axes, x + 4.2, y, title, 13, INK, ha="left", weight="bold")
        label(axes, x + 4.2, y - 3, line, 10.5, MUTED, ha="left")

    step(4, 67, "a", "LoRA on every module", "trained on instructions")
    modules(axes, 8, 40.5, lambda layer, role: LORA)
    step(46, 67, "b", "A score for each module", "what it contributes to the model")
    modules(axes, 50, 40.5, lambda layer, role: mixed(LORA, SCORES[layer][role]))
    step(4, 32, "c", "The best modules per layer", "the others are removed: the setting")
    modules(axes, 8, 5.5, lambda layer, role: LORA if KEPT[layer][role] else EMPTY)
    step(46, 32, "d", "The setting is reused", "a new adapter for each tenant")
    for shift, (tenant, colour) in enumerate({"A": LORA, "B": ORANGE, "C": TEAL}.items()):
        x = 49 + 11.4 * shift
        modules(axes, x, 12, lambda layer, role, c=colour: c if KEPT[layer][role] else EMPTY, cell=1.45, names=False)
        label(axes, x + 5, 9.2, f"tenant {tenant}", 10.5, colour)
    arrow(axes, (36, 51), (44.5, 51))
    arrow(axes, (47, 40), (36, 27), bend=-0.15)
    arrow(axes, (36, 15.5), (46.5, 15.5))
    return figure


def para() -> Figure:
    figure, axes = canvas(86, 72)
    label(axes, 4, 67, "Prefill: once per prompt, in each block", 13, INK, ha="left", weight="bold")
    for index, word in enumerate(("Is", "this", "review", "positive", "?")):
        named_box(axes, 4, 60 - 4.3 * index, 11, 3.5, word, "#dfe3f6", 10.5)
    label(axes, 9.5, 39.6, "hidden states h\nof the prompt", 10, MUTED)
    parts = {"pool": 10, "down": 8, "act": 7, "up": 7}
    x = 20.0
    box(axes, x - 1.2, 46.2, 40.8, 14.6, fill="#f4ece4", edge="#ecd9c5", corner=1.2)
    label(axes, x + 19.2, 58.6, "vector generator", 10.5, ORANGE)
    arrow(axes, (15.4, 52), (x, 52))
    for name, width in parts.items():
        named_box(axes, x, 49.5, width, 5, name, ORANGE)
        x += width + 2.1
        arrow(axes, (x - 1.9, 52), (x + (3.2 if name == "up" else -0.2), 52))
    label(axes, 39, 47.7, "r = 12 numbers between down and up", 10, MUTED)
    for index, name in enumerate("QVU"):
        named_box(axes, 64, 56.2 - 5.6 * index, 17.5, 4.3, f"$l_{name}$", ORANGE, 12)
    label(axes, 72.7, 42, "one vector each for\nQ, V and the up projection", 10, MUTED)
    arrow(axes, (72.7, 39.2), (72.7, 34.8), ORANGE)

    axes.plot([4, 60], [36.4, 36.4], color=LINE, lw=1)
    label(axes, 4, 32.4, "Decoding: each generated token", 13, INK, ha="left", weight="bold")
    box(axes, 62, 26.2, 20.5, 8.2, fill="#f4ece4", edge="#ecd9c5", corner=1.2)
    label(axes, 72.2, 30.3, "kept with the\nKV cache", 10.5, ORANGE)
    named_box(axes, 4, 13.5, 11, 4.2, "token", "#dfe3f6", 10.5)
    rows = (("Attention", ("Q", "K", "V", "O"), 19.5), ("Feed-forward", ("G", "U", "D"), 8.2))
    for name, roles, y in rows:
        label(axes, 25.5, y + 2.2, name, 10.5, MUTED)
        for index, role in enumerate(roles):
            left = 34 + 12 * index
            named_box(axes, left, y, 4.6, 4.4, role, LORA if role in "QVU" else "#cfd5e2")
            if role in "QVU":
                label(axes, left + 7.4, y + 2.2, f"$\\odot\\;l_{role}$", 12.5, ORANGE)
        arrow(axes, (15.4, 15.6), (20, y + 2.2))
    label(
        axes,
        43,
        4,
        "one multiplication per target, for rows of any tenant; nothing at K, O, G and D",
        10,
        MUTED,
    )
    return figure


def draw(folder: Path) -> None:
    """Writes fanlora.svg and para.svg, the same bytes each time."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(
        {"svg.hashsalt": "peft_fanlora", "font.family": "DejaVu Sans", "mathtext.fontset": "dejavusans"}
    ):
        for name, picture in {"fanlora": fanlora, "para": para}.items():
            picture().savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
