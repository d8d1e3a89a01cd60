"""The choices of modules from few to all, which the plot and the report show."""

from pathlib import Path
from typing import Any

import pytest

from integration_tests.helpers.costs import ABOUT, costs, scores
from integration_tests.helpers.models import tiny
from peft_fanlora import FanLoraSetting, ImportanceScores
from peft_fanlora.fanlora.tradeoff import Choice, cost_label, tradeoff


def curves(engine: str | None = None) -> dict[str, list[Choice]]:
    own = scores()
    return tradeoff(own, own.select, None if engine is None else costs(engine))


def test_each_choice_is_what_select_returns() -> None:
    own = scores()
    found = curves()
    assert list(found) == ["global", "by role", "per layer", "all modules"]
    assert [len(choices) for choices in found.values()] == [20, 6, 6, 1]
    for choice in found["global"] + found["by role"] + found["per layer"]:
        assert set(choice.names) == set(own.select(**choice.how).names)
        assert choice.cost == len(choice.names)
        assert choice.share == pytest.approx(sum(own[name] for name in choice.names) / sum(own.values()))
    assert found["all modules"] == [({}, list(own), 21, pytest.approx(1))]


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_no_choice_per_layer_keeps_more_in_the_time_of_a_budget(engine: str) -> None:
    own, measured = scores(), costs(engine)
    found = curves(engine)
    budgets = found["time budget"]
    assert 5 < len(budgets) <= 26
    for choice in budgets:
        assert choice.how["max_slowdown"] == round(choice.how["max_slowdown"], 3)
        setting = own.select(**choice.how, costs=measured)
        assert set(setting.names) == set(choice.names)
        assert choice.cost == pytest.approx(setting.calibration["predicted_slowdown"], abs=1e-4)
        for other in found["per layer"]:
            assert other.cost > choice.how["max_slowdown"] or other.share <= choice.share + 1e-9
    assert set(budgets[-1].names) >= {name for name, score in own.items() if score > 0}


def test_large_models_have_a_bounded_number_of_choices() -> None:
    names = [f"model.layers.{layer}.{role}" for layer in range(40) for role in ("a", "b", "c")]
    about: dict[str, Any] = {"num_layers": {"model.layers": 40}, "model_type": None, "calibration": {}}
    own = ImportanceScores(dict.fromkeys(names, 1.0), method="path", num_tokens=1, **about)
    kept = [choice.cost for choice in tradeoff(own, own.select, None)["global"]]
    assert kept == list(range(2, 120, 2))


def test_scores_of_a_setting_select_again(tmp_path: Path) -> None:
    own = scores()
    own.select(max_slowdown=1.05, costs=costs()).save_pretrained(tmp_path)
    loaded = ImportanceScores.from_setting(FanLoraSetting.from_pretrained(tmp_path))
    assert dict(loaded) == dict(own)
    assert (loaded.method, loaded.num_tokens, loaded.num_layers) == ("path", 1, {"model.layers": 3})
    again = loaded.select(keep=1)
    assert again.kept == own.select(keep=1).kept
    assert again.calibration == own.select(keep=1).calibration  # without what the budget had added
    by_hand = FanLoraSetting.from_modules(tiny("llama"), ["model.layers.0.mlp.up_proj"])
    with pytest.raises(ValueError, match="has no scores"):
        ImportanceScores.from_setting(by_hand)


def test_the_plot_shows_each_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: (drawn.append(self), save(self, *args, **kwargs))
    )
    own = scores()
    own.plot_tradeoff(tmp_path / "new" / "time.png", costs("vllm"), own.select(2))
    own.plot_tradeoff(tmp_path / "numbers.svg")
    assert (tmp_path / "new" / "time.png").read_bytes().startswith(b"\x89PNG")
    for figure, engine, marked in zip(drawn, ("vllm", None), (["this setting"], []), strict=True):
        (axes,) = figure.axes
        expected = curves(engine)
        assert [line.get_label() for line in axes.lines] == list(expected)
        for line, choices in zip(axes.lines, expected.values(), strict=True):
            assert [tuple(point) for point in line.get_xydata()] == [(one.cost, one.share) for one in choices]
        assert [marks.get_label() for marks in axes.collections] == marked
        assert axes.get_xlabel() == cost_label(None if engine is None else costs(engine))


def test_what_has_no_tradeoff(tmp_path: Path) -> None:
    own = scores()
    negative = ImportanceScores(dict.fromkeys(own, -1.0), **ABOUT)
    with pytest.raises(ValueError, match="add up to zero or less"):
        negative.plot_tradeoff(tmp_path / "x.png")
    other = FanLoraSetting.from_modules(tiny("opt"), ["model.decoder.layers.0.fc1"])
    with pytest.raises(ValueError, match=r"keeps model\.decoder\.layers\.0\.fc1, which is not scored"):
        own.plot_tradeoff(tmp_path / "x.png", setting=other)
    with pytest.raises(ValueError, match="is not a module of the timed model"):
        own.plot_tradeoff(tmp_path / "x.png", costs(model="opt"))
    assert not list(tmp_path.iterdir())
