"""The time that LoRA modules add to a decoding step, and the modules with the highest scores within a time budget."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..sharing.reading import checked, ignore_later_fields, read_json
from ..sharing.writing import staged
from .choices import Engine, Strategy
from .knapsack import best_even_items, best_items, fits, import_scipy
from .modules import ModuleName
from .shapes import CostsFile


Unit = tuple[str, tuple[str, str] | str]
"""What an engine computes at once: a module, or a packed layer, as its block and its role or packed group."""


@dataclass(frozen=True)
class ModuleCosts:
    """The measured time of LoRA modules in a decoding step, made by `module_costs` [ours].

    A step with LoRA on the modules S takes, relative to the step of the base model,

        t(S) / t({}) = 1 + per_step + sum over m in C(S) of (per_module + per_parameter * p_m),

    where C(S) are the modules that the engine computes: S itself in transformers; in vLLM each module of every packed
    layer that has a module in S, because vLLM computes LoRA for Q, K and V (and for gate and up) together even if an
    adapter has one of them. p_m is the number of parameters that one adapter has in the module, r (d_in + d_out).

    Attributes:
        engine: the engine that was timed.
        per_step: the time of a step with any adapters that does not depend on their modules, as a share of the base
            model's step.
        per_module: the fixed part of a module's time, as a share of the base model's step.
        per_parameter: the part per parameter, as a share of the base model's step.
        parameters: the number of parameters of one adapter in each module, by the module's qualified name.
        error: the largest difference between a measured ratio and its prediction from the other measurements.
        measured: the measured ratios by the number of modules and parameters: (modules, parameters, ratio).
        conditions: rank, tenants, rows, device, threads and the base model's step in milliseconds.
    """

    engine: Engine
    per_step: float
    per_module: float
    per_parameter: float
    parameters: Mapping[str, int]
    error: float
    measured: Sequence[tuple[int, int, float]] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def units(self) -> dict[Unit, list[str]]:
        """Returns the modules of each unit, which the engine computes at once, in the model's order."""
        found: dict[Unit, list[str]] = {}
        for name in self.parameters:
            module = ModuleName.parse(name)
            part = module.packed_group if self.engine == "vllm" else module.role
            found.setdefault((module.block, part), []).append(name)
        return found

    def size(self, names: Iterable[str]) -> tuple[int, int]:
        """Returns how many modules the engine computes for adapters on these modules, and their number of parameters.

        Raises:
            ValueError: a module was not in the timed model.
        """
        computed = [name for members in self._units_with(names).values() for name in members]
        return len(computed), sum(self.parameters[name] for name in computed)

    def _units_with(self, names: Iterable[str]) -> dict[Unit, list[str]]:
        """Returns the units that have one of these modules, which must be of the timed model."""
        names = {names} if isinstance(names, str) else set(names)
        if unknown := sorted(names - self.parameters.keys()):
            raise ValueError(
                f"{unknown[0]} is not a module of the timed model, which has {len(self.parameters)} modules such as "
                f"{next(iter(self.parameters))}: measure the costs on the model that was scored."
            )
        return {unit: members for unit, members in self.units().items() if names & set(members)}

    def slowdown(self, names: Iterable[str]) -> float:
        """Returns the predicted time of a decoding step with LoRA on these modules, relative to the base model's step.

        Raises:
            ValueError: a module was not in the timed model.
        """
        num_modules, num_parameters = self.size(names)
        if not num_modules:
            return 1.0
        return 1 + self.per_step + self.per_module * num_modules + self.per_parameter * num_parameters

    def cost(self, unit: Iterable[str]) -> float:
        """Returns the time of the modules of a unit, as a share of the base model's step."""
        return sum(self.per_module + self.per_parameter * self.parameters[name] for name in unit)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves the costs as JSON, for use in another environment."""
        with staged(Path(path).parent) as stage:
            (stage / Path(path).name).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ModuleCosts":
        """Loads saved costs. Fields that a later version has added are ignored with a warning.

        Raises:
            OSError: the file cannot be read.
            ValueError: its content is not that of saved costs.
        """
        file = checked(CostsFile, read_json(Path(path)), str(path))
        ignore_later_fields(sorted(file.model_extra or ()), str(path), stacklevel=3)
        measured = tuple((int(modules), int(parameters), ratio) for modules, parameters, ratio in file.measured)
        return cls(**{**{each.name: getattr(file, each.name) for each in fields(cls)}, "measured": measured})

    def best(self, scores: Mapping[str, float], max_slowdown: float, strategy: Strategy = "layer") -> list[str]:
        """Returns the modules with the highest sum of scores whose predicted slowdown is at most `max_slowdown`.

        This is the exact solution of a knapsack problem over the units, found by SciPy's `milp`. What has no positive
        score is not kept, even in a packed layer that is used by others.

        Args:
            scores: the scores by qualified module name.
            max_slowdown: the time budget.
            strategy: "layer" for numbers of units that differ by at most one between the blocks, except where a block
                has no more; "role" for a role in all blocks of a stack or in none; "global" for any units.

        Raises:
            ValueError: nothing has a positive score, `max_slowdown` leaves no time for anything that has, or a module
                was not in the timed model.
            ModuleNotFoundError: SciPy is missing.
        """
        self.size(scores)
        positive = _positive(scores, by_role=strategy == "role")
        if not positive:
            raise ValueError("No module has a positive score, so there is none that is worth its time.")
        units: dict[Unit, list[str]] = {}
        for (block, part), members in self._units_with(positive).items():
            place = ModuleName.parse(members[0]).stack if strategy == "role" else block
            units.setdefault((place, part), []).extend(members)
        values = [sum(positive.get(name, 0.0) for name in members) for members in units.values()]
        costs = [self.cost(members) for members in units.values()]
        left = max_slowdown - 1 - self.per_step
        if not fits(min(costs), left):
            raise ValueError(
                f"max_slowdown={max_slowdown!r} leaves no time for any of the {len(positive)} modules: the fastest "
                f"choice makes a step {1 + self.per_step + min(costs):.3f} times as long as the base model's."
            )
        if strategy == "layer":
            blocks: dict[str, list[int]] = {}
            for index, (block, _) in enumerate(units):
                blocks.setdefault(block, []).append(index)
            chosen = best_even_items(values, costs, left, list(blocks.values()))
        else:
            chosen = best_items(values, costs, left)
        members_of = list(units.values())
        return [name for index in chosen for name in members_of[index] if name in positive]


def _positive(scores: Mapping[str, float], *, by_role: bool) -> dict[str, float]:
    """Returns the modules with positive scores, or those of the roles whose scores have a positive sum."""
    places: dict[str, Any] = {name: ModuleName.parse(name).place if by_role else name for name in scores}
    worth: dict[Any, float] = {}
    for name, score in scores.items():
        worth[places[name]] = worth.get(places[name], 0.0) + score
    return {name: score for name, score in scores.items() if worth[places[name]] > 0}


def fit(
    engine: Engine,
    parameters: Mapping[str, int],
    measured: Sequence[tuple[int, int, float]],
    conditions: Mapping[str, Any],
) -> ModuleCosts:
    """Returns the costs that fit measured ratios with the least squared error, none of them negative.

    Args:
        engine: the engine that was timed.
        parameters: the number of parameters of one adapter in each module.
        measured: at least four measurements: the number of computed modules, their number of parameters, the ratio.
        conditions: under which conditions they were measured.
    """
    solve = import_scipy().nnls
    scale = max(number for _, number, _ in measured)
    rows = [(1, modules, number / scale) for modules, number, _ in measured]
    excess = [ratio - 1 for *_, ratio in measured]

    def fitted(without: int | None = None) -> Any:
        kept = [index for index in range(len(rows)) if index != without]
        return solve([rows[index] for index in kept], [excess[index] for index in kept])[0]

    errors = [
        abs(sum(part * cost for part, cost in zip(row, fitted(index), strict=True)) - excess[index])
        for index, row in enumerate(rows)
    ]
    per_step, per_module, per_scale = map(float, fitted())
    return ModuleCosts(
        engine,
        per_step,
        per_module,
        per_scale / scale,
        dict(parameters),
        float(max(errors)),
        tuple(measured),
        dict(conditions),
    )
