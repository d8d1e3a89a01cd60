"""The costs of modules, and the choice of modules within a time budget."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from integration_tests.helpers.costs import ABOUT, PER_MODULE, PER_PARAMETER, PER_STEP, costs, scores
from integration_tests.helpers.models import fanlora, tiny
from peft_fanlora import ImportanceScores, ModuleCosts, module_costs
from peft_fanlora.fanlora import cost_measurement
from peft_fanlora.fanlora.candidates import candidates
from peft_fanlora.fanlora.costs import fit
from peft_fanlora.timing import Contestant, Seconds


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("strategy", ["layer", "role", "global"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_the_choice_is_the_best_within_the_budget(engine: Any, seed: int, strategy: Any) -> None:
    """Against all sets of units of a model with few."""
    found, own = costs(engine), dict(scores(seed))
    first_layers = [name for name in found.parameters if ".layers.2." not in name]
    found = replace(found, parameters={name: found.parameters[name] for name in first_layers})
    own = {name: own[name] for name in first_layers}
    units: dict[Any, list[str]] = {}
    for (block, part), members in found.units().items():
        units.setdefault(part if strategy == "role" else (block, part), []).extend(members)
    worth = {name: own[name] for name in own}
    if strategy == "role":  # is kept in each layer, also where its score is negative
        worth = {name: sum(own[f"model.layers.{layer}.{name[15:]}"] for layer in (0, 1)) / 2 for name in own}
    kept = {unit: [name for name in members if worth[name] > 0] for unit, members in units.items()}
    budget = 1 + 0.4 * (found.slowdown(first_layers) - 1)

    def is_allowed(chosen: Any) -> bool:
        if strategy != "layer":
            return True
        counts = Counter(block for block, _ in chosen)
        sizes = Counter(block for (block, _), members in kept.items() if members)
        return any(all(min(k, n) <= counts[block] <= k + 1 for block, n in sizes.items()) for k in range(8))

    useful = [unit for unit, members in kept.items() if members]
    sets = itertools.chain.from_iterable(itertools.combinations(useful, size) for size in range(1, len(useful) + 1))
    names = ([name for unit in each for name in kept[unit]] for each in sets if is_allowed(each))
    best = max((each for each in names if found.slowdown(each) <= budget), key=lambda each: sum(own[n] for n in each))
    chosen = found.best(own, budget, strategy)
    assert 1 < found.slowdown(chosen) <= budget
    assert set(chosen) == set(best)


@pytest.mark.parametrize(("strategy", "keep"), [("layer", 1), ("layer", 3), ("role", 2), ("global", 5)])
def test_at_the_time_of_so_many_modules_the_strategy_chooses_these(strategy: Any, keep: int) -> None:
    """Where all modules cost the same, a budget is a number of modules."""
    equal = replace(costs(), per_parameter=0.0)
    own = ImportanceScores({name: abs(score) for name, score in scores().items()}, **ABOUT)
    setting = own.select(keep, strategy=strategy)
    within = own.select(max_slowdown=equal.slowdown(setting.names), costs=equal, strategy=strategy)
    assert within.kept == setting.kept


def test_a_block_with_fewer_modules_does_not_limit_the_others() -> None:
    own = {name: score if ".layers.1." in name else abs(score) for name, score in scores().items()}
    own.update({name: -1.0 for name in own if ".layers.1." in name and not name.endswith("q_proj")})
    chosen = costs().best({**own, "model.layers.1.self_attn.q_proj": 0.1}, 1.08)
    counts = Counter(name.split(".")[2] for name in chosen)
    assert counts["1"] == 1 and min(counts["0"], counts["2"]) > 2


def test_a_role_of_the_encoder_is_not_one_of_the_decoder() -> None:
    own = {
        f"{stack}.block.{layer}.{role}": 1.0 for stack in ("encoder", "decoder") for layer in (0, 1) for role in "qo"
    }
    own["decoder.block.1.q"] = 1.5
    timed = ModuleCosts("transformers", 0.0, 0.01, 0.0, dict.fromkeys(own, 1), 0.0)
    assert timed.best(own, 1.025, "role") == ["decoder.block.0.q", "decoder.block.1.q"]


def test_small_scores_are_compared_as_exactly_as_large_ones() -> None:
    """The solver stops at an absolute gap, which is more than such scores."""
    own = scores()
    small = {name: score * 1e-8 for name, score in own.items()}
    assert costs().best(small, 1.05) == costs().best(own, 1.05)


def test_in_vllm_one_projection_costs_the_packed_layer() -> None:
    block = "model.layers.0.self_attn."
    of_vllm, of_transformers = costs("vllm"), costs()
    packed = [f"{block}{part}_proj" for part in "qkv"]
    assert of_vllm.slowdown(packed[2:]) == of_vllm.slowdown(packed)
    assert of_transformers.slowdown(packed[2:]) < of_transformers.slowdown(packed)
    assert of_vllm.size(packed[:1]) == of_vllm.size(packed) == of_transformers.size(packed)
    assert of_vllm.slowdown([]) == 1
    assert of_vllm.slowdown(packed[0]) == of_vllm.slowdown(packed[:1])


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_a_budget_may_be_the_time_of_one_module(engine: Any) -> None:
    found, own = costs(engine), dict.fromkeys(costs().parameters, 1.0)
    fastest = min(found.slowdown([name]) for name in own)
    for budget in (fastest, fastest - 1e-13):
        assert found.slowdown(found.best(own, budget)) == pytest.approx(fastest)
    with pytest.raises(ValueError, match="no time for any of the 21 modules"):
        found.best(own, fastest - 1e-6)


def test_modules_with_negative_scores_are_left_out_of_a_large_budget() -> None:
    own = scores()
    setting = own.select(max_slowdown=100, costs=costs())
    assert set(setting.names) == {name for name, score in own.items() if score > 0}
    assert set(setting.dropped) | set(setting.kept) and len(setting.dropped) + len(setting.kept) == len(own)


def test_without_positive_scores_no_budget_can_be_used() -> None:
    with pytest.raises(ValueError, match="No module has a positive score"):
        costs().best({name: -(score**2) for name, score in scores().items()}, 1.05)


def test_the_setting_says_how_it_was_chosen(tmp_path: Path) -> None:
    setting = scores().select(max_slowdown=1.05, costs=costs("vllm"))
    setting.save_pretrained(tmp_path)
    how = json.loads((tmp_path / "fanlora_setting.json").read_text())["calibration"]
    assert (how["strategy"], how["max_slowdown"], how["engine"], how["error"]) == ("layer", 1.05, "vllm", 0.01)
    assert 1 < how["predicted_slowdown"] <= 1.05
    assert "| time budget, relative to the base model's step | 1.05 |" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_slowdown": 1.05}, "needs both"),
        ({"costs": 0}, "needs both"),
        ({"max_slowdown": 1.05, "costs": 0, "keep": 3}, "not both"),
        ({"max_slowdown": 1.05, "costs": 0, "packed": True}, "not both"),
        ({"max_slowdown": 1.05, "costs": 0, "strategy": "budget"}, "strategy='budget' is unknown"),
        ({"max_slowdown": 1.0, "costs": 0}, "max_slowdown=1.0 is not above 1"),
        ({"max_slowdown": float("nan"), "costs": 0}, "max_slowdown=nan is not above 1"),
        ({"max_slowdown": "1.05", "costs": 0}, "max_slowdown='1.05' is not above 1"),
        ({"max_slowdown": float("inf"), "costs": 0}, "max_slowdown=inf is not above 1 and finite"),
        ({"max_slowdown": 1.001, "costs": 0}, "the fastest choice makes a step 1.0"),
    ],
)
def test_budgets_that_cannot_be_kept(arguments: dict[str, Any], words: str) -> None:
    given = {**arguments, "costs": costs()} if "costs" in arguments else arguments
    with pytest.raises(ValueError, match=words):
        scores().select(**given)


def test_costs_of_another_model() -> None:
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.down_proj is not a module of the timed model"):
        scores().select(max_slowdown=1.05, costs=costs(model="opt"))


def test_the_fit_recovers_the_costs() -> None:
    sizes = [(210, 2_000_000), (105, 1_000_000), (60, 300_000), (50, 700_000), (50, 450_000), (50, 550_000)]
    exact = [(modules, number, 1.01 + 1e-3 * modules + 1e-7 * number) for modules, number in sizes]
    found = fit("transformers", costs().parameters, exact, {})
    assert (found.per_step, found.per_module, found.per_parameter) == tuple(map(pytest.approx, (1e-2, 1e-3, 1e-7)))
    assert found.error == pytest.approx(0, abs=1e-9)
    exact[2] = (*sizes[2], exact[2][2] + 0.1)
    assert fit("transformers", costs().parameters, exact, {}).error > 0.05


def test_costs_are_saved_and_loaded(tmp_path: Path) -> None:
    measured = [(21, 9_000, 1.4), (10, 3_000, 1.1), (11, 6_000, 1.3), (5, 3_000, 1.05)]
    found = fit("vllm", costs().parameters, measured, {"r": 8})
    found.save(tmp_path / "costs.json")
    assert ModuleCosts.load(tmp_path / "costs.json") == found
    content = json.loads((tmp_path / "costs.json").read_text())
    for damage, words in (
        ({"engine": "x"}, "engine is 'x'"),
        ({"per_module": -1.0}, "per_module is -1.0"),
        ({"error": None}, "error"),
    ):
        (tmp_path / "damaged.json").write_text(json.dumps({**content, **damage}))
        with pytest.raises(ValueError, match=words):
            ModuleCosts.load(tmp_path / "damaged.json")


@pytest.mark.parametrize("tenants", [1, 3])
def test_costs_are_measured_on_the_model(tenants: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that counts the adapted layers that a step passes, in place of time."""
    model = fanlora()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    assert any(trained)

    def counted(contestants: list[Contestant], rounds: Any, prompts: Any, stopwatch: Any) -> Seconds:
        def cost(one: Contestant) -> float:
            layers = {name: layer for name, layer in candidates(one.model).items() if hasattr(layer, "lora_A")}
            assert all(len(layer.lora_A) == tenants for layer in layers.values())
            parameters = sum(8 * (layer.in_features + layer.out_features) for layer in layers.values())
            return 1 + (PER_STEP + PER_MODULE * len(layers) + PER_PARAMETER * parameters if layers else 0)

        for one in contestants:
            one.model(input_ids=prompts(), **one.call)
        return {one.name: [cost(one)] * 2 for one in contestants}

    monkeypatch.setattr(cost_measurement, "decode_steps", counted)
    found = module_costs(model, tenants=tenants, rounds=2)
    expected = [pytest.approx(cost, rel=0.02) for cost in (PER_STEP, PER_MODULE, PER_PARAMETER)]
    assert [found.per_step, found.per_module, found.per_parameter] == expected
    assert list(found.parameters) == list(costs().parameters)
    assert found.error < 1e-3
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_costs_are_timed() -> None:
    found = module_costs(fanlora(), tenants=2, rounds=2)
    assert found.conditions["base_ms"] > 0 and len(found.measured) == 6


def test_a_model_without_adapters_stays_trainable() -> None:
    model = tiny("llama").train()
    module_costs(model, tenants=1, rounds=2)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_what_cannot_be_timed() -> None:
    with pytest.raises(ValueError, match="engine='x' is unknown; use one of transformers, vllm"):
        module_costs(fanlora(), "x")  # type: ignore[arg-type]
    for argument, value in {"tenants": 0, "r": 0, "rounds": 1}.items():
        with pytest.raises(ValueError, match=f"`{argument}` is {value}; it must be an integer of at least"):
            module_costs(fanlora(), **{argument: value})
    with pytest.raises(ValueError, match=r"3 module\(s\) to choose from; costs need at least four"):
        module_costs(nn.Sequential(*[nn.Linear(2, 2) for _ in range(3)]))
