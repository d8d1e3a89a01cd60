"""Which modules a selection keeps: plain arithmetic on scores, no model."""

from typing import Any

import pytest

from peft_fanlora import ImportanceScores


ROLES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"]


def scores(rows: list[list[float]], roles: list[str] = ROLES, stack: str = "model.layers") -> ImportanceScores:
    """One row per layer, one column per role."""
    values = {
        f"{stack}.{layer}.{role}": score
        for layer, row in enumerate(rows)
        for role, score in zip(roles, row, strict=True)
    }
    return ImportanceScores(
        values, method="path", num_tokens=1, num_layers={stack: len(rows)}, model_type="llama", calibration={}
    )


def kept(setting: Any) -> list[str]:
    return [name.removeprefix("model.layers.") for name in setting.names]


def test_per_layer() -> None:
    setting = scores([[5, 1, 4, 2, 3], [1, 2, 3, 4, 5]]).select(keep=2)
    assert kept(setting) == ["0.self_attn.q_proj", "0.self_attn.v_proj", "1.mlp.gate_proj", "1.mlp.up_proj"]
    assert len(setting.dropped) == 6
    assert setting.calibration["keep"] == 2


def test_two_modules_per_layer_by_default() -> None:
    rows = scores([[5, 1, 4, 2, 3], [1, 2, 3, 4, 5]])
    assert rows.select() == rows.select(keep=2, strategy="layer", packed=False)


def test_negative_scores_rank_below_zero() -> None:
    assert kept(scores([[-5, -1, 0, -9, -2]]).select(2)) == ["0.self_attn.k_proj", "0.self_attn.v_proj"]


def test_by_role_takes_the_sum_over_layers() -> None:
    setting = scores([[9, 0, 3, 1, 3], [0, 0, 4, 1, 6]]).select(strategy="role", keep=2)
    assert setting.roles == ["self_attn.q_proj", "mlp.up_proj"]
    assert len(setting.kept) == 4


def test_global_may_leave_a_layer_empty() -> None:
    setting = scores([[9, 8, 7, 0, 0], [1, 1, 1, 1, 1]]).select(strategy="global", keep=3)
    assert kept(setting) == ["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"]


def test_packed_projections_stay_or_go_together() -> None:
    rows = [[5, 0, 0, 2, 2.5], [0, 0, 4, 2, 2.5]]
    assert kept(scores(rows).select(1, packed=True)) == [
        *["0.self_attn.q_proj", "0.self_attn.k_proj", "0.self_attn.v_proj"],
        *["1.mlp.gate_proj", "1.mlp.up_proj"],
    ]
    assert scores(rows).select(strategy="role", keep=1, packed=True).roles == ROLES[:3]
    assert len(scores(rows).select(strategy="global", keep=1, packed=True).kept) == 3


def test_a_module_outside_any_packed_layer_is_its_own() -> None:
    setting = scores([[5, 1, 4, 2]], [*ROLES[:3], "mlp.down_proj"]).select(1, packed=True)
    assert len(setting.kept) == 3


def test_ties_break_by_role_order_then_by_layer() -> None:
    rows = [[1.0] * 5, [1.0] * 5]
    assert kept(scores(rows).select(2)) == [f"{layer}.{role}" for layer in range(2) for role in ROLES[:2]]
    assert kept(scores(rows).select(strategy="global", keep=3)) == [
        *["0.self_attn.q_proj", "0.self_attn.k_proj"],
        "1.self_attn.q_proj",
    ]
    assert scores(rows).select(strategy="role", keep=1).roles == ROLES[:1]


def test_two_stacks_are_ranked_each_for_itself() -> None:
    values = {"encoder.block.0.q": 1.0, "encoder.block.0.v": 2.0, "decoder.block.0.q": 9.0, "decoder.block.0.v": 8.0}
    both = ImportanceScores(
        values,
        method="path",
        num_tokens=1,
        num_layers={"encoder.block": 1, "decoder.block": 1},
        model_type="t5",
        calibration={},
    )
    assert both.select(1).names == ["encoder.block.0.v", "decoder.block.0.q"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"strategy": "best", "keep": 1}, "strategy='best' is unknown"),
        ({"keep": None}, "keep=None is not a whole number"),
        ({"keep": 2.5}, "keep=2.5 is not a whole number"),
        ({"keep": True}, "keep=True is not a whole number"),
        ({"strategy": "role", "keep": "2"}, "keep='2' is not a whole number"),
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": 5}, "there are 5 to choose from, so it must be at least 1 and less than 5"),
        ({"strategy": "global", "keep": 10}, "less than 10"),
        ({"keep": 2, "packed": True}, "packed=True there are 2 to choose from"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        scores([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]).select(**arguments)
