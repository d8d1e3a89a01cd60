"""The result of scoring, and the selection of modules from it."""

import os
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from .choices import Strategy
from .modules import ModuleName
from .setting import FanLoraSetting


if TYPE_CHECKING:
    import pandas

    from .costs import ModuleCosts


_FACTS_OF_CHOICES = ("strategy", "keep", "packed", "max_slowdown", "engine", "predicted_slowdown", "error")
"""The calibration facts of a setting that are about its choice of modules."""


class ImportanceScores(Mapping[str, float]):
    """The score of each module, by its qualified name and in the model's order; higher is more important.

    It is used like a dict: `scores["model.layers.7.mlp.up_proj"]`.

    Attributes:
        method: the score's name.
        num_tokens: the number of label tokens that it was averaged over; 0 for `weight_norm`, which needs no data.
        num_layers: the number of layers of each stack of blocks.
        model_type: the model type, such as "llama".
        calibration: facts about the scoring, which are stored in settings made from these scores.
    """

    def __init__(
        self,
        scores: Mapping[str, float],
        *,
        method: str,
        num_tokens: int,
        num_layers: Mapping[str, int],
        model_type: str | None,
        calibration: Mapping[str, Any],
    ) -> None:
        self._scores = dict(scores)
        self.method = method
        self.num_tokens = num_tokens
        self.num_layers = dict(num_layers)
        self.model_type = model_type
        self.calibration = {"method": method, "num_tokens": num_tokens, **calibration}

    @classmethod
    def from_setting(cls, setting: FanLoraSetting) -> "ImportanceScores":
        """Returns the scores that a setting was selected by, for another choice without scoring again.

        Args:
            setting: a setting with scores; its modules without a score are left out.

        Raises:
            ValueError: the setting has no scores, such as a hand-written one.

        Examples:
            >>> scores = ImportanceScores.from_setting(FanLoraSetting.from_pretrained("me/my-setting"))
            >>> setting = scores.select(max_slowdown=1.05, costs=costs)
        """
        setting.require_scores()
        facts = dict(setting.calibration)
        stacks = list(setting.num_layers)
        scores = {module: score for module, score in {**setting.kept, **setting.dropped}.items() if score is not None}
        in_order = sorted(scores, key=lambda module: (stacks.index(module.stack), module.layer, module.role))
        return cls(
            {module.name: scores[module] for module in in_order},
            method=facts.pop("method", None) or "unknown",
            num_tokens=facts.pop("num_tokens", 0),
            num_layers=setting.num_layers,
            model_type=setting.model_type,
            calibration={name: fact for name, fact in facts.items() if name not in _FACTS_OF_CHOICES},
        )

    def __getitem__(self, name: str) -> float:
        return self._scores[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._scores)

    def __len__(self) -> int:
        return len(self._scores)

    def __repr__(self) -> str:
        return f"ImportanceScores({len(self)} modules, method={self.method!r}, num_tokens={self.num_tokens})"

    def to_dataframe(self) -> "pandas.DataFrame":
        """Returns a table with one row per module: `module`, `stack`, `layer`, `role`, `score`. Needs pandas."""
        import pandas

        rows = [(name, *ModuleName.parse(name), score) for name, score in self.items()]
        return pandas.DataFrame(rows, columns=["module", *ModuleName._fields, "score"])

    def plot(self, path: str | os.PathLike[str], setting: FanLoraSetting | None = None) -> None:
        """Saves a heat map of the scores, layers by roles, as an image file. Needs matplotlib.

        Args:
            path: the file; its suffix sets the format, as for `matplotlib.figure.Figure.savefig`.
            setting: a setting whose modules are marked.
        """
        from .plots import plot_modules

        scores = {ModuleName.parse(name): score for name, score in self.items()}
        kept = setting.kept if setting is not None else ()
        plot_modules(scores, path=path, title=f"Importance by {self.method}", kept=kept)

    def plot_tradeoff(
        self,
        path: str | os.PathLike[str],
        costs: "ModuleCosts | None" = None,
        setting: FanLoraSetting | None = None,
    ) -> None:
        """Saves a plot of what the choices of modules cost and which share of the scores they keep, as an image file.

        It shows the choices of `select` per layer, by role, of the whole model and, with `costs`, within time budgets.
        Needs matplotlib.

        Args:
            path: the file; its suffix sets the format, as for `matplotlib.figure.Figure.savefig`.
            costs: the costs of the modules, from `module_costs`, for the predicted time of a decoding step. Without
                them, the cost of a choice is its number of modules.
            setting: a setting from these scores that is marked.

        Raises:
            ValueError: the scores do not have a positive sum, or a module of the setting has no score or no costs.
        """
        from .plots import plot_tradeoff
        from .tradeoff import choice, cost_label, tradeoff

        curves = tradeoff(self, self.select, costs)
        marked = None if setting is None else choice(self, setting.names, costs, {})
        title = f"Share of the importance by {self.method} that is kept"
        plot_tradeoff(curves, path=path, title=title, cost=cost_label(costs), marked=marked)

    def select(
        self,
        keep: int = 2,
        *,
        strategy: Strategy = "layer",
        packed: bool = False,
        max_slowdown: float | None = None,
        costs: "ModuleCosts | None" = None,
    ) -> FanLoraSetting:
        """Selects the most important modules and returns them as a setting.

        - "layer": the best `keep` modules of each layer. Keeping only the most critical modules of each layer is the
          paper's rule [P]; how many is not known to us.
        - "role": the `keep` roles with the highest sum of scores over the layers, in all layers. Engines that wrap
          linear layers by role then wrap only these [ours].
        - "global": the best `keep` modules of the whole model [ours].

        With `max_slowdown` and `costs`, the number of modules follows from a time budget instead of `keep`: the modules
        with the highest sum of scores for which a decoding step takes at most `max_slowdown` times the base model's
        [ours]. The strategy holds as well: "layer" keeps as many modules in each layer as in any other, give or take
        one; "role" keeps a role in all layers or in none; "global" keeps any modules.

        Ties are resolved by the order of the roles in the model, then by the layer.

        Args:
            keep: how many to keep: modules per layer ("layer"), roles ("role") or modules ("global").
            strategy: which modules are ranked against each other.
            packed: keep projections that engines pack into one matrix (Q, K and V; gate and up) together or not at
                all. A packed layer then counts as one module, and its score is the sum over its members.
            max_slowdown: the time budget, such as 1.05, in place of `keep`. What is packed follows from the engine.
            costs: the costs of the modules on the serving machine, from `module_costs`.

        Returns:
            The setting, with the scores of the modules kept and dropped.

        Raises:
            ValueError: `keep` is not an integer, is below 1 or would keep everything; the strategy is unknown; the time
                budget has no costs, or no module fits into it.
        """
        if strategy not in get_args(Strategy):
            raise ValueError(f"strategy={strategy!r} is unknown; use one of {', '.join(get_args(Strategy))}.")
        if max_slowdown is not None or costs is not None:
            return self._within_budget(max_slowdown, costs, strategy, (keep, packed) != (2, False))
        if not isinstance(keep, int) or isinstance(keep, bool):
            raise ValueError(f"keep={keep!r} is not a whole number: pass how many to keep.")
        modules = [ModuleName.parse(name) for name in self]
        role_order = {
            place: position for position, place in enumerate(dict.fromkeys(module.place for module in modules))
        }

        units: dict[tuple[Any, ...], list[ModuleName]] = {}  # modules that are kept or dropped together
        for module in modules:
            layer = None if strategy == "role" else module.layer
            part = module.packed_group if packed else module.role
            units.setdefault((module.stack, layer, part), []).append(module)
        contests: dict[str, list[list[ModuleName]]] = {}  # units that are ranked against each other
        for unit in units.values():
            contests.setdefault(unit[0].block if strategy == "layer" else "", []).append(unit)

        largest = max(map(len, contests.values()))
        if not 1 <= keep < largest:
            raise ValueError(
                f"keep={keep} keeps nothing or drops nothing: with strategy={strategy!r} and packed={packed} there "
                f"are {largest} to choose from, so it must be at least 1 and less than {largest}."
            )

        def rank(unit: list[ModuleName]) -> tuple[float, int, int]:
            return -sum(self[module.name] for module in unit), role_order[unit[0].place], unit[0].layer

        best = [unit for contest in contests.values() for unit in sorted(contest, key=rank)[:keep]]
        chosen = {module.name for unit in best for module in unit}
        return self._setting(chosen, {"strategy": strategy, "keep": keep, "packed": packed})

    def _within_budget(
        self, max_slowdown: float | None, costs: "ModuleCosts | None", strategy: Strategy, is_counted_too: bool
    ) -> FanLoraSetting:
        if max_slowdown is None or costs is None:
            raise ValueError(
                "A time budget needs both `max_slowdown`, such as 1.05, and `costs`: measure them with "
                "`module_costs(model)` on the machine that serves."
            )
        if is_counted_too:
            raise ValueError("Pass either `max_slowdown` and `costs`, or `keep` and `packed`, not both.")
        if not isinstance(max_slowdown, (int, float)) or not 1 < max_slowdown < float("inf"):
            raise ValueError(
                f"max_slowdown={max_slowdown!r} is not above 1 and finite: it is the time of a decoding step relative to the base "
                "model's, such as 1.05."
            )
        chosen = set(costs.best(self, max_slowdown, strategy))
        predicted = {"predicted_slowdown": round(costs.slowdown(chosen), 4), "error": round(costs.error, 4)}
        how = {"strategy": strategy, "max_slowdown": max_slowdown, "engine": costs.engine, **predicted}
        return self._setting(chosen, how)

    def _setting(self, chosen: Collection[str], how: Mapping[str, Any]) -> FanLoraSetting:
        kept = {ModuleName.parse(name): score for name, score in self.items() if name in chosen}
        dropped = {ModuleName.parse(name): score for name, score in self.items() if name not in chosen}
        return FanLoraSetting(kept, dropped, self.num_layers, self.model_type, {**self.calibration, **how})
