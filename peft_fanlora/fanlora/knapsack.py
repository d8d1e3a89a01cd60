"""Exact solutions of knapsack problems, by SciPy's solver of mixed-integer linear programs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

from .extras import from_extra


def best_items(values: Sequence[float], costs: Sequence[float], budget: float) -> list[int]:
    """Returns the indices of the items with the highest sum of values that fit into the budget.

    Args:
        values: the value of each item, above zero.
        costs: the cost of each item, at least zero.
        budget: the largest sum of costs, which at least one item has to fit into.

    Raises:
        ModuleNotFoundError: SciPy is missing.
    """
    return _solved(values, costs, budget) or []


def best_even_items(
    values: Sequence[float], costs: Sequence[float], budget: float, groups: Sequence[Sequence[int]]
) -> list[int]:
    """Returns the same for a choice that takes as many items of each group as of any other, give or take one.

    A group that has fewer items than that is taken whole.

    Args:
        values: the value of each item, above zero.
        costs: the cost of each item, at least zero.
        budget: the largest sum of costs, which at least one item has to fit into.
        groups: the indices of the items of each group.

    Raises:
        ModuleNotFoundError: SciPy is missing.
    """
    ranked = [sorted(group, key=lambda index: -values[index]) for group in groups]
    most = max(map(len, ranked))
    # The best `least` items of each group fit, so that no choice with fewer of a group is better.
    least = max(k for k in range(most + 1) if fits(sum(costs[item] for group in ranked for item in group[:k]), budget))
    found: list[int] = []
    for smallest in range(least, most + 1):
        bounds = ((group, min(smallest, len(group)), smallest + 1) for group in ranked)
        chosen = _solved(values, costs, budget, bounds)
        if chosen is None:  # not even the cheapest ones fit
            break
        found = max(found, chosen, key=lambda items: sum(values[item] for item in items))
    return found


def fits(cost: float, budget: float) -> bool:
    """Whether a sum of costs is within a budget, or above it by no more than rounding."""
    return cost <= budget or math.isclose(1 + cost, 1 + budget)


def _solved(
    values: Sequence[float],
    costs: Sequence[float],
    budget: float,
    bounds: Iterable[tuple[Sequence[int], int, int]] = (),
) -> list[int] | None:
    """Returns the best items, with a least and a largest number of some groups; None if no choice meets the bounds."""
    optimize = import_scipy()
    value_scale, cost_scale = max(values), min(costs) or 1.0  # the solver's tolerances are absolute
    limits = [optimize.LinearConstraint([[cost / cost_scale for cost in costs]], ub=budget / cost_scale)]
    for group, least, largest in bounds:
        members = set(group)
        limits.append(optimize.LinearConstraint([[item in members for item in range(len(costs))]], least, largest))
    found = optimize.milp(
        [-value / value_scale for value in values],
        integrality=[1] * len(values),
        bounds=optimize.Bounds(0, 1),
        constraints=limits,
        options={"mip_rel_gap": 0.0},
    )
    return None if found.x is None else [item for item, x in enumerate(found.x) if x > 0.5]


def import_scipy() -> Any:
    """Returns `scipy.optimize`.

    Raises:
        ModuleNotFoundError: SciPy is missing.
    """
    with from_extra("costs", "A time budget needs SciPy"):
        from scipy import optimize
    return optimize
