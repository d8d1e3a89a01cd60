"""Choices of modules from few to all, with what they cost and the share of the scores that they keep."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from .choices import Strategy
from .modules import ModuleName


if TYPE_CHECKING:
    from .costs import ModuleCosts

_NUM_BUDGETS = 25
"""The largest number of time budgets, each of which takes a fraction of a second to solve."""
_NUM_KEPT = 60
"""The largest number of choices per strategy."""
_STRATEGIES: dict[str, Strategy] = {"global": "global", "by role": "role", "per layer": "layer"}


class Choice(NamedTuple):
    """A choice of modules.

    Attributes:
        how: the arguments of `ImportanceScores.select` that choose these modules; empty for all modules.
        names: the qualified names of the modules.
        cost: the predicted time of a decoding step relative to the base model's, or the number of modules.
        share: the sum of the modules' scores relative to that of all modules.
    """

    how: Mapping[str, Any]
    names: Collection[str]
    cost: float
    share: float


def choice(
    scores: Mapping[str, float], names: Collection[str], costs: ModuleCosts | None, how: Mapping[str, Any]
) -> Choice:
    """Returns a choice with its cost and its share of the scores.

    Raises:
        ValueError: a module has no score or no costs.
    """
    if unknown := sorted(set(names) - scores.keys()):
        raise ValueError(f"The setting keeps {unknown[0]}, which is not scored: pass a setting from these scores.")
    cost = len(names) if costs is None else costs.slowdown(names)
    return Choice(how, names, cost, sum(scores[name] for name in names) / sum(scores.values()))


def tradeoff(
    scores: Mapping[str, float], select: Callable[..., Any], costs: ModuleCosts | None
) -> dict[str, list[Choice]]:
    """Returns the choices of each strategy, from few modules to many; with costs, those within time budgets come first.

    Args:
        scores: the scores by qualified module name.
        select: `ImportanceScores.select` of these scores.
        costs: the costs of the modules; the cost of a choice is the number of its modules without them.

    Raises:
        ValueError: the scores do not have a positive sum, or a module has no costs.
    """
    if sum(scores.values()) <= 0:
        raise ValueError(
            "The scores of all modules add up to zero or less, so there is no share to keep: the adapter does not "
            "lower the calibration loss. Train it longer, or score it on data of its task."
        )
    modules = [ModuleName.parse(name) for name in scores]
    sizes = {
        "layer": max(Counter(module.block for module in modules).values()),
        "role": len({module.place for module in modules}),
        "global": len(modules),
    }
    curves: dict[str, list[Choice]] = {}
    if costs is not None:
        curves["time budget"] = list(_within_budgets(scores, costs))
    for label, strategy in _STRATEGIES.items():
        step = max(1, round(_step(sizes[strategy], _NUM_KEPT)))
        arguments = [{"keep": keep, "strategy": strategy} for keep in range(step, sizes[strategy], step)]
        curves[label] = [choice(scores, select(**how).names, costs, how) for how in arguments]
    curves["all modules"] = [choice(scores, list(scores), costs, {})]
    return {label: choices for label, choices in curves.items() if choices}


def cost_label(costs: ModuleCosts | None) -> str:
    """Returns what the cost of a choice is, for an axis."""
    if costs is None:
        return "number of modules with LoRA"
    return f"predicted decoding step in {costs.engine}, base model = 1 (error {costs.error:.3f})"


def _within_budgets(scores: Mapping[str, float], costs: ModuleCosts) -> Iterator[Choice]:
    """Yields the choices within round time budgets, from the fastest module to all modules with positive scores."""
    costs.size(scores)
    units = [unit for unit in costs.units().values() if any(scores.get(name, 0.0) > 0 for name in unit)]
    prices = [costs.cost(unit) for unit in units]
    least, most = costs.per_step + min(prices), costs.per_step + sum(prices)
    step = _step(sum(prices), _NUM_BUDGETS)
    before: set[str] = set()
    for part in range(max(1, math.ceil(least / step)), math.ceil(most / step) + 1):
        budget = float(f"{1 + part * step:.12g}")
        names = costs.best(scores, budget)
        if set(names) != before:
            yield choice(scores, names, costs, {"max_slowdown": budget})
            before = set(names)


def _step(span: float, most: int) -> float:
    """Returns the smallest of ..., 0.1, 0.2, 0.5, 1, 2, 5, ... of which at most `most` fit into `span`."""
    if span <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= span * (1 - 1e-9))
