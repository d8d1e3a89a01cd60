"""A web page with the heat map of the scores and the modules that stay at each budget. Needs plotly."""

import html
import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from string import Template
from typing import Any

from .card import facts_of
from .costs import ModuleCosts
from .extras import from_extra
from .modules import ModuleName, layers_by_role, ranges
from .scores import ImportanceScores
from .setting import FanLoraSetting
from .tradeoff import Choice, choice, cost_label, tradeoff


_CONFIG = {"displayModeBar": False, "responsive": True}
_GAP = 55
"""Between two panels, in pixels."""
_FONT = {"family": "system-ui, sans-serif", "size": 12}
_SHOWN = {"symbol": "circle-open", "size": 16, "color": "black", "line": {"width": 2}}
_SAVED = {"symbol": "star", "size": 13, "color": "white", "line": {"width": 1.5, "color": "black"}}


def import_plotly() -> Any:
    """Returns `plotly.graph_objects`.

    Raises:
        ModuleNotFoundError: plotly is missing.
    """
    with from_extra("report", "report.html needs plotly"):
        from plotly import graph_objects
    return graph_objects


def page(scores: ImportanceScores, setting: FanLoraSetting, costs: ModuleCosts | None = None) -> str:
    """Returns a page that needs no other file and no network: the same arguments give the same text.

    It shows the scores with the kept modules, and what each choice of modules costs: the predicted time of a decoding
    step, or the number of modules without costs. If the scores do not have a positive sum, it shows the scores only.

    Args:
        scores: the scores.
        setting: the setting that was selected from these scores.
        costs: the costs of the modules.

    Raises:
        ValueError: a module has no costs.
        ModuleNotFoundError: plotly is missing.
    """
    import_plotly()
    kept = [name for name in setting.names if name in scores]
    return _template("report.html").substitute(
        title=html.escape(f"Importance of {len(scores):,} modules by {scores.method}"),
        subtitle=html.escape(f"Model type: {setting.model_type}. The setting keeps {len(kept):,} modules."),
        heat_width=160 + 7 * max(scores.num_layers.values(), default=1),
        heat=_div(_heat_map(scores, kept), "heat", with_library=True),
        tradeoff=_tradeoff(scores, kept, costs) if sum(scores.values()) > 0 else "",
        facts=_facts(setting),
    )


def _template(name: str) -> Template:
    return Template(files(__package__).joinpath(name).read_text(encoding="utf-8"))


def _div(figure: Any, name: str, *, with_library: bool = False) -> str:
    height = f"{figure.layout.height}px"
    return figure.to_html(_CONFIG, full_html=False, include_plotlyjs=with_library, div_id=name, default_height=height)


def _facts(setting: FanLoraSetting) -> str:
    rows = [
        f"<tr><td>{html.escape(str(name))}</td><td>{html.escape(str(value))}</td></tr>"
        for name, value in facts_of(setting.calibration).items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _panels(scores: ImportanceScores) -> dict[str, list[str]]:
    """Returns the roles of each stack, in the model's order."""
    found: dict[str, list[str]] = {}
    for module in map(ModuleName.parse, scores):
        roles = found.setdefault(module.stack, [])
        if module.role not in roles:
            roles.append(module.role)
    return found


def _heat_map(scores: ImportanceScores, kept: Collection[str]) -> Any:
    """Returns one panel per stack, each with a heat map and the dots on the kept modules."""
    from plotly.subplots import make_subplots

    panels = _panels(scores)
    limit = max(map(abs, scores.values())) or 1.0
    order = sorted(scores, key=lambda name: -scores[name])
    ranks = {name: place for place, name in enumerate(order, start=1)}

    def color(score: float) -> float:
        """Linear up to a tenth of the largest score, logarithmic above."""
        return math.asinh(10 * score / limit)

    sizes = [len(roles) for roles in panels.values()]
    panels_height = 22 * sum(sizes) + _GAP * (len(sizes) - 1)
    figure = make_subplots(len(panels), 1, row_heights=sizes, vertical_spacing=_GAP / panels_height)
    for row, (stack, roles) in enumerate(panels.items(), start=1):
        depth = scores.num_layers.get(stack, 1)
        names = [[ModuleName(stack, layer, role).name for layer in range(depth)] for role in roles]
        about = [
            [
                [html.escape(name), f"{scores[name]:.4g}", ranks[name]] if name in scores else ["", "", ""]
                for name in line
            ]
            for line in names
        ]
        figure.add_heatmap(
            z=[[color(scores[name]) if name in scores else None for name in line] for line in names],
            customdata=about,
            hovertemplate="%{customdata[0]}<br>score %{customdata[1]}, rank %{customdata[2]} of "
            f"{len(scores):,}<extra></extra>",
            coloraxis="coloraxis",
            xgap=1,
            ygap=1,
            hoverongaps=False,
            row=row,
            col=1,
        )
        dots = [module for module in map(ModuleName.parse, kept) if module.stack == stack]
        figure.add_scatter(
            x=[module.layer for module in dots],
            y=[roles.index(module.role) for module in dots],
            mode="markers",
            marker={"size": 7, "color": "white", "line": {"width": 1, "color": "black"}},
            hoverinfo="skip",
            row=row,
            col=1,
        )
        labels = [html.escape(role) for role in roles]
        ticks = {"tickvals": list(range(len(roles))), "ticktext": labels}
        figure.update_yaxes(ticks, range=[len(roles) - 0.5, -0.5], automargin=True, row=row, col=1)
        title = "layer" if len(panels) == 1 else f"layer of {html.escape(stack)}"
        figure.update_xaxes(title={"text": title, "standoff": 4}, range=[-0.5, depth - 0.5], row=row, col=1)
    lowest = min(0.0, *scores.values())
    marks = [mark * limit for mark in (-1, -0.3, -0.1, 0, 0.1, 0.3, 1) if mark * limit >= lowest]
    bar = {
        "title": {"text": "score", "side": "bottom"},
        "tickvals": [color(mark) for mark in marks],
        "ticktext": [f"{mark:.2g}" for mark in marks],
        "orientation": "h",
        "y": -45 / panels_height,
        "yanchor": "top",
        "thickness": 12,
    }
    colors = {"colorscale": "Viridis", "cmin": color(lowest), "cmax": color(limit), "colorbar": bar}
    return _styled(figure, panels_height + 100, {"t": 10, "r": 10, "b": 90}, coloraxis=colors, showlegend=False)


def _styled(figure: Any, height: int, margin: Mapping[str, int], **layout: Any) -> Any:
    """Returns the figure, without zoom, so that the page can be scrolled on a phone."""
    figure.update_xaxes(fixedrange=True, zeroline=False)
    figure.update_yaxes(fixedrange=True, zeroline=False)
    return figure.update_layout(
        template="plotly_white", font=_FONT, height=height, margin={"l": 10, **margin}, dragmode=False, **layout
    )


def _tradeoff(scores: ImportanceScores, kept: Sequence[str], costs: ModuleCosts | None) -> str:
    curves = tradeoff(scores, scores.select, costs)
    saved = choice(scores, kept, costs, {})
    panels = _panels(scores)
    places = [
        (list(panels).index(module.stack), module.layer, panels[module.stack].index(module.role))
        for module in map(ModuleName.parse, scores)
    ]
    indices = {name: index for index, name in enumerate(scores)}
    choices = {
        label: [
            {
                "cost": one.cost,
                "share": one.share,
                "kept": sorted(indices[name] for name in one.names),
                "summary": _summary(label, one, saved, len(scores), costs),
                "calls": _calls(one.how),
                "roles": _roles(one.names, len(panels) > 1),
            }
            for one in found
        ]
        for label, found in curves.items()
    }
    if costs is None:
        about = "Without measured costs, a budget is the number of modules with LoRA."
    else:
        about = (
            f"The time of a decoding step is predicted for {costs.engine} from measured costs, with an error of "
            f"{costs.error:.3f}; 1 is the base model's step."
        )
    content = {"choices": choices, "modules": places, "start": _start(curves, saved)}
    return _template("tradeoff.html").substitute(
        about=html.escape(about),
        curves=_div(_curves(curves, saved, costs), "curves"),
        data=json.dumps(content, separators=(",", ":")).replace("<", "\\u003c"),
    )


def _curves(curves: Mapping[str, Sequence[Choice]], saved: Choice, costs: ModuleCosts | None) -> Any:
    figure = import_plotly().Figure()
    time = "" if costs is None else ", predicted step %{x:.3f}"
    for label, choices in curves.items():
        figure.add_scatter(
            x=[one.cost for one in choices],
            y=[one.share for one in choices],
            name=label,
            mode="lines+markers",
            customdata=[[_how(label, one.how), len(one.names)] for one in choices],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]} modules"
            f"{time}<br>%{{y:.1%}} of the score<extra></extra>",
        )
    for label, marker in (("saved setting", _SAVED), ("shown", _SHOWN)):
        figure.add_scatter(
            x=[saved.cost], y=[saved.share], name=label, mode="markers", marker=marker, hoverinfo="skip"
        )
    figure.update_xaxes(title=cost_label(costs).replace(", base", ",<br>base"), automargin=True)
    figure.update_yaxes(title="share of the summed scores", tickformat=".0%", rangemode="tozero", automargin=True)
    legend = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "itemclick": False, "itemdoubleclick": False}
    return _styled(figure, 440, {"t": 70, "r": 16, "b": 60}, legend=legend, hovermode="closest")


def _how(label: str, how: Mapping[str, Any]) -> str:
    if "max_slowdown" in how:
        return f"{label} {how['max_slowdown']:g}"
    return f"{label}, keep {how['keep']}" if how else label


def _summary(label: str, one: Choice, saved: Choice, num_modules: int, costs: ModuleCosts | None) -> str:
    time = "" if costs is None else f", predicted step {one.cost:.3f}"
    is_saved = " This is the saved setting." if set(one.names) == set(saved.names) else ""
    counts = f"{len(one.names):,} of {num_modules:,} modules"
    return f"{_how(label, one.how)}: {counts}{time}, {one.share:.1%} of the summed scores.{is_saved}"


def _calls(how: Mapping[str, Any]) -> list[str]:
    """Returns how to get the setting, in Python and on the command line."""
    if "max_slowdown" in how:
        budget = how["max_slowdown"]
        return [f"scores.select(max_slowdown={budget}, costs=costs)", f"peft-fanlora find --max-slowdown {budget} …"]
    if not how:
        return []
    keep, strategy = how["keep"], how["strategy"]
    call = f'scores.select(keep={keep}, strategy="{strategy}")'
    return [call, f"peft-fanlora find --strategy {strategy} --keep {keep} …"]


def _roles(names: Collection[str], with_stack: bool) -> list[list[str]]:
    modules = map(ModuleName.parse, names)
    return [
        [role, str(len(layers)), ranges(layers)]
        for role, layers in layers_by_role(modules, with_stack=with_stack).items()
    ]


def _start(curves: Mapping[str, Sequence[Choice]], saved: Choice) -> tuple[str, int]:
    """Returns the choice to show first: the saved setting, or the best one that costs no more."""
    for label, choices in curves.items():
        for index, one in enumerate(choices):
            if set(one.names) == set(saved.names):
                return label, index
    label, choices = next(iter(curves.items()))
    return label, max((index for index, one in enumerate(choices) if one.cost <= saved.cost), default=0)
