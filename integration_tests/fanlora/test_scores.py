"""The five scores against their definitions, and that scoring leaves no trace."""

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset

from integration_tests.helpers.brute_force import loss_of
from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from peft_fanlora import ImportanceScores
from peft_fanlora.fanlora.candidates import lora_modules
from peft_fanlora.fanlora.choices import ScoreName
from peft_fanlora.fanlora.importance import SCORES, Score, find_score, importance_score


pytestmark = pytest.mark.slow

METHODS = list(SCORES)


def layers_of(model: PeftModel, adapter_name: str = "default") -> dict[str, Any]:
    return lora_modules(model.get_base_model(), adapter_name)


def test_the_command_line_offers_all_scores_of_the_package() -> None:
    own = [name for name, score in SCORES.items() if score.function.__module__.startswith("peft_fanlora")]
    assert own == list(get_args(ScoreName))


@pytest.mark.support("scoring")
@pytest.mark.parametrize("name", TINY)
def test_path_sums_to_what_the_adapter_gains(name: str) -> None:
    model, tiny = fanlora(name), TINY[name]
    randomize(model, std=0.1)
    batches = [tiny.batch(seed=0), tiny.batch(rows=2, tokens=9, seed=1)]
    num_points = 128 if name == "opt" else 32  # the kinks of OPT's ReLU need more
    scores = model.score_modules(batches, num_points=num_points, progress=False)
    everything = set(scores)
    gain = loss_of(model, batches, set()) - loss_of(model, batches, everything)
    assert len(scores) == tiny.num_modules
    assert sum(scores.values()) == pytest.approx(gain, rel=1e-2)


@pytest.mark.parametrize("name", TINY)
def test_ablation_equals_brute_force(name: str) -> None:
    model, tiny = fanlora(name), TINY[name]
    batches = [tiny.batch(seed=0), tiny.batch(rows=2, tokens=9, seed=1)]
    scores = model.score_modules(batches, "ablation", progress=False)
    everything = set(scores)
    for module in list(scores)[::4]:
        expected = (
            -loss_of(model, batches, everything)
            + loss_of(model, batches, everything - {module})
            - loss_of(model, batches, {module})
        )
        assert scores[module] == pytest.approx(expected, abs=1e-5)


def test_sensitivity_is_the_slope_at_the_trained_model() -> None:
    model, batches = fanlora(), [TINY["llama"].batch()]
    scores = model.score_modules(batches, "sensitivity", progress=False)
    module, layer = list(layers_of(model).items())[5]
    step, losses = 1e-2, []
    for factor in (1 - step, 1 + step):
        layer.scaling["default"] *= factor
        losses.append(loss_of(model, batches, set(scores)))
        layer.scaling["default"] /= factor
    assert scores[module] == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-2)


def test_output_norm_is_the_mean_square_over_label_tokens() -> None:
    model, batch = fanlora(), TINY["llama"].batch()
    scores = model.score_modules([batch], "output_norm", progress=False)
    predicts = batch["labels"][:, 1:] != -100
    squares = {}
    for name, layer in layers_of(model).items():
        inputs: list[torch.Tensor] = []
        handle = layer.register_forward_pre_hook(lambda module, args, seen=inputs: seen.append(args[0]))
        logits(model, batch)
        handle.remove()
        delta = inputs[0] @ layer.get_delta_weight("default").T
        squares[name] = delta.square().sum(-1)[:, :-1][predicts].mean().item()
    assert sum(scores.values()) == pytest.approx(1)
    for name, square in squares.items():
        assert scores[name] == pytest.approx(square / sum(squares.values()), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weight_norm_is_the_frobenius_norm(name: str) -> None:
    model = fanlora(name)
    scores = model.score_modules(None, "weight_norm", progress=False)
    for module, layer in layers_of(model).items():
        assert scores[module] == pytest.approx(layer.get_delta_weight("default").norm().item(), rel=1e-5)
    assert scores.num_tokens == 0


@pytest.mark.parametrize("method", [name for name in METHODS if SCORES[name].needs_data])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_padding_and_batch_size_change_nothing(name: str, method: str) -> None:
    model, tiny = fanlora(name), TINY[name]
    whole = tiny.batch(rows=4)
    rows = [{key: value[index : index + 1] for key, value in whole.items()} for index in range(4)]
    sides = {"input_ids": (0, 3), "attention_mask": (0, 0), "labels": (0, -100)}
    padded = {
        key: torch.nn.functional.pad(value, (0, 5), value=sides[key][1]) if value.ndim == 2 else value
        for key, value in whole.items()
    }
    expected = model.score_modules([whole], method, progress=False)
    for batches in (rows, [padded]):
        scores = model.score_modules(batches, method, progress=False)
        assert scores.num_tokens == expected.num_tokens
        assert list(scores.values()) == pytest.approx(list(expected.values()), rel=1e-4, abs=5e-6)


def test_a_batch_without_label_tokens_counts_nothing() -> None:
    """The mean over no tokens is not a number; it must not spoil the other batches."""
    model, batch = fanlora(), TINY["llama"].batch()
    unlabelled = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    expected = model.score_modules([batch], progress=False)
    assert dict(model.score_modules([batch, unlabelled], progress=False)) == dict(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_model_is_bit_identical_afterwards(method: str) -> None:
    model, batch = fanlora(lora_dropout=0.1), TINY["llama"].batch()
    model.train()
    model.get_base_model().model.layers[1].eval()
    model(**batch).loss.backward()
    shuffling = torch.utils.data.DataLoader([{k: v[0] for k, v in batch.items()}] * 4, batch_size=2, shuffle=True)

    def tensors() -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        return copy.deepcopy([*model.state_dict().values(), *gradients, torch.get_rng_state()])

    def flags() -> list[Any]:
        return copy.deepcopy(
            [
                [parameter.requires_grad for parameter in model.parameters()],
                [(module.training, len(module._forward_hooks)) for module in model.modules()],
                [(layer.scaling, layer.active_adapters, layer.lora_variant) for layer in layers_of(model).values()],
                (random.getstate(), np.random.get_state()[1].tolist()),
            ]
        )

    before = tensors(), flags()
    model.score_modules(shuffling, method, progress=False)
    torch.testing.assert_close(tensors(), before[0], rtol=0, atol=0)
    assert flags() == before[1]
    assert all(type(layer.scaling["default"]) is float for layer in layers_of(model).values())


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model, batch = fanlora(), TINY["llama"].batch()
    before = logits(model, batch)
    with pytest.raises(IndexError):
        model.score_modules([batch, {**batch, "input_ids": batch["input_ids"] + 1000}], progress=False)
    assert torch.equal(logits(model, batch), before)
    assert all(type(layer.scaling["default"]) is float for layer in layers_of(model).values())
    assert all(parameter.requires_grad for name, parameter in model.named_parameters() if "lora_" in name)


@pytest.mark.support("bfloat16")
@pytest.mark.support("float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_models_score_like_float32(dtype: torch.dtype) -> None:
    batch = TINY["llama"].batch(rows=8, tokens=16)
    exact, rounded = (
        randomize(fanlora(base=TINY["llama"].base().to(kind)), std=0.2) for kind in (torch.float32, dtype)
    )
    expected, low = (model.score_modules([batch], progress=False) for model in (exact, rounded))
    correlation = np.corrcoef(list(expected.values()), list(low.values()))[0, 1]
    assert correlation > 0.99


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"use_rslora": True, "lora_alpha": 3},
        {"rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 5}},
    ],
    ids=lambda config: next(iter(config)) + str(next(iter(config.values()))),
)
def test_gates_work_for_lora_variants(config: dict[str, Any]) -> None:
    """At g = 0 the base model must answer, also where the adapter changed its weights or norms when it was made."""
    tiny, batch = TINY["llama"], TINY["llama"].batch()
    model = fanlora(**config)
    randomize(model, std=0.1)
    base_loss = tiny.base()(**batch).loss.item()
    with torch.no_grad():
        trained_loss = model(**batch).loss.item()
    scores = model.score_modules([batch], num_points=64, progress=False)
    assert sum(scores.values()) == pytest.approx(base_loss - trained_loss, rel=2e-2)


def test_a_named_adapter_is_scored_alone() -> None:
    from peft_fanlora import FanLoraConfig

    model, batch = fanlora(), TINY["llama"].batch()
    expected = dict(model.score_modules([batch], progress=False))
    model.add_adapter("other", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    model.set_adapter("other")
    assert dict(model.score_modules([batch], adapter_name="default", progress=False)) == expected
    assert model.active_adapter == "other"
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained and all(".other." in name for name in trained)
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="2 adapters are active"):
        model.score_modules([batch], progress=False)


LISTS = r"`input_ids` of a calibration batch is a list instead of a tensor, as in a row of a dataset .* DataLoader\("


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"method": "magic"}, "method='magic' is unknown; use one of path, ablation"),
        ({"num_batches": 0}, "`num_batches` is 0"),
        ({"num_points": 0}, "`num_points` is 0"),
        ({"adapter_name": "nobody"}, "There is no adapter 'nobody'; this model has"),
        ({"dataloader": None}, "needs calibration data"),
        ({"dataloader": []}, "no label tokens"),
        ({"dataloader": TINY["llama"].batch()}, r"returned a str instead of a dict .* score_modules\(\[batch\]\)"),
        ({"dataloader": "my-data"}, "`dataloader` is 'my-data'; pass an iterable of batches"),
        ({"dataloader": 3}, "`dataloader` is 3; pass an iterable of batches"),
        ({"dataloader": (batch for batch in ())}, "is empty, as a generator is after its first use"),
        ({"dataloader": [{name: value.tolist() for name, value in TINY["llama"].batch().items()}]}, LISTS),
        ({"dataloader": [{**TINY["llama"].batch(), "labels": [[1, 2, 3]] * 3}]}, "`labels` .* is a list instead of"),
        ({"dataloader": Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2, 3]]})}, LISTS),
        (
            {"dataloader": [{"input_ids": torch.arange(3), "labels": torch.arange(3)}]},
            r"shape \(3,\), that of a single row",
        ),
        ({"dataloader": [{"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(3, 3).long()}]}, "has 2 rows"),
        (
            {"dataloader": [{"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2, 4).long()}]},
            "one label per token",
        ),
        (
            {"dataloader": [{"input_ids": torch.ones(2, 3).long(), "labels": torch.ones(2).long()}]},
            "one label per token",
        ),
        ({"dataloader": [{"input_ids": torch.ones(2, 3).long(), "labels": torch.tensor(1)}]}, "has 2 rows"),
        ({"dataloader": [(torch.ones(1, 3), torch.ones(1, 3))]}, "returned a tuple instead of a dict"),
        ({"dataloader": [{"input_ids": torch.ones(1, 3, dtype=torch.long)}]}, "no `labels`, only"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], reason: str) -> None:
    arguments = {"dataloader": [TINY["llama"].batch()], "progress": False, **arguments}
    with pytest.raises(ValueError, match=reason):
        fanlora().score_modules(**arguments)


@pytest.mark.support("scoring a merged or disabled adapter", refused=True)
def test_merged_and_disabled_adapters_are_refused() -> None:
    model, batches = fanlora(), [TINY["llama"].batch()]
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model.score_modules(batches, progress=False)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="enable_adapter_layers"):
        model.score_modules(batches, progress=False)


def test_a_loss_that_is_not_finite_is_reported() -> None:
    model = fanlora()
    next(iter(layers_of(model).values())).lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="calibration loss of batch 0 is nan"):
        model.score_modules([TINY["llama"].batch()], progress=False)


def test_the_batch_with_a_loss_that_is_not_finite_is_named() -> None:
    model = fanlora()
    model.get_input_embeddings().weight.data[5] = float("inf")
    batch = TINY["llama"].batch()
    good, bad = ({**batch, "input_ids": torch.full_like(batch["input_ids"], token)} for token in (6, 5))
    assert all(map(math.isfinite, model.score_modules([good], progress=False).values()))
    with pytest.raises(ValueError, match="calibration loss of batch 1 is nan"):
        model.score_modules([good, bad], progress=False)


def test_a_score_that_is_not_finite_names_the_module() -> None:
    """A gradient may overflow where the loss does not."""
    model = fanlora()
    names = list(layers_of(model))

    def overflows(loss: Any, num_points: int) -> torch.Tensor:
        return torch.tensor([1.0] * 3 + [float("inf")] + [1.0] * (len(names) - 4))

    with pytest.raises(ValueError, match=f"score 'overflows' of {names[3]} is not finite on batch 0"):
        model.score_modules([TINY["llama"].batch()], overflows, progress=False)
    layers_of(model)[names[2]].lora_A["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=f"score 'weight_norm' of {names[2]} is not finite for its weights"):
        model.score_modules(None, "weight_norm")


def test_num_batches_and_generators() -> None:
    model = fanlora()
    batches = [TINY["llama"].batch(seed=seed) for seed in range(3)]
    expected = dict(model.score_modules(batches[:2], progress=False))
    assert dict(model.score_modules(iter(batches), num_batches=2, progress=False)) == expected


def test_eva_initialises_and_scores() -> None:
    from peft import EvaConfig, initialize_lora_eva_weights

    batch = TINY["llama"].batch(rows=8, tokens=16)
    model = fanlora(init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(model, [batch] * 2, show_progress_bar=False)
    randomize(model, std=0.1)
    assert len(model.score_modules([batch], progress=False)) == 21


def test_scores_read_like_a_dict(tmp_path: Path) -> None:
    scores = fanlora().score_modules([TINY["llama"].batch()], progress=False)
    assert isinstance(scores, ImportanceScores)
    assert scores["model.layers.1.mlp.up_proj"] == dict(scores)["model.layers.1.mlp.up_proj"]
    assert (scores.method, scores.num_tokens) == ("path", 16)
    table = scores.to_dataframe()
    assert list(table.columns) == ["module", "stack", "layer", "role", "score"]
    assert len(table) == 21
    assert table.iloc[-1].tolist()[:4] == ["model.layers.2.mlp.down_proj", "model.layers", 2, "mlp.down_proj"]
    scores.plot(tmp_path / "heat.png", scores.select(2))
    assert (tmp_path / "heat.png").read_bytes().startswith(b"\x89PNG")


def test_streamed_batches() -> None:
    """Guards against asking a loader for its length, which one over a stream does not have."""
    batch = TINY["llama"].batch()
    rows = [{name: value[row] for name, value in batch.items()} for row in range(3)]

    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
            return iter(rows)

    streamed = fanlora().score_modules(DataLoader(Stream(), batch_size=2), num_points=2)
    assert dict(streamed) == pytest.approx(dict(fanlora().score_modules([batch], num_points=2)), rel=1e-4, abs=1e-7)


def test_a_function_is_scored_with_and_bad_shapes_are_refused(tmp_path: Path) -> None:
    def closing(loss: Any, num_points: int) -> torch.Tensor:
        return -loss.gradient(1.0)

    model, batches = fanlora("llama"), [TINY["llama"].batch()]
    scores = model.score_modules(batches, closing, progress=False)
    assert scores.method == "closing" and "num_points" not in scores.calibration
    assert dict(scores) == dict(model.score_modules(batches, "sensitivity", progress=False))
    with pytest.raises(ValueError, match="'<lambda>' returned the shape"):
        model.score_modules(batches, lambda loss, num_points: torch.zeros(()), progress=False)


def test_a_distributed_run_of_one_process_scores_the_same() -> None:
    batches = [TINY["llama"].batch()]
    alone = fanlora().score_modules(batches, "sensitivity", progress=False)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        together = fanlora().score_modules(batches, "sensitivity", progress=False)
    finally:
        torch.distributed.destroy_process_group()
    assert dict(together) == dict(alone) and together.num_tokens == alone.num_tokens


def test_a_registered_score_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peft_fanlora.fanlora.importance.SCORES", dict(SCORES))

    def doubled(loss: Any, num_points: int) -> torch.Tensor:
        return -2 * loss.gradient(1.0)

    assert importance_score("-2 ∂L/∂g_m at g = 1")(doubled) is doubled
    assert find_score("doubled") == find_score(doubled) == Score(doubled, "-2 ∂L/∂g_m at g = 1")
    importance_score("again, as when its cell of a notebook runs again")(doubled)
    assert find_score("doubled").equation.startswith("again")
    batches = [TINY["llama"].batch()]
    simple = fanlora().score_modules(batches, "sensitivity", progress=False)
    assert dict(fanlora().score_modules(batches, "doubled", progress=False)) == pytest.approx(
        {name: 2 * score for name, score in simple.items()}, rel=1e-6
    )

    def path(loss: Any, num_points: int) -> torch.Tensor:
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"^There is already a score .path., in \S+\.importance: choose"):
        importance_score("")(path)
