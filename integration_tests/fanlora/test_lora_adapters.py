"""Adapters that plain LoRA trained, as tenants of a FanLoRA model: the same output, and scored and pruned like its own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from integration_tests.helpers.models import (
    CAUSAL,
    ENCODERS,
    SEQ2SEQ,
    TINY,
    fanlora,
    logits,
    randomize,
    tiny,
    tokens,
)
from integration_tests.helpers.tenants import alone
from peft_fanlora import FanLoraConfig, export_lora, load_tenant
from peft_fanlora.fanlora.batches import AdapterStack
from peft_fanlora.serving.tenants import BASE_ROWS


pytestmark = pytest.mark.slow

VARIANTS: dict[str, dict[str, Any]] = {
    "first": {"r": 4, "lora_alpha": 6, "target_modules": "all-linear"},
    "second": {"r": 2, "use_rslora": True, "target_modules": "all-linear"},
}


NOT_MIXED = {
    "mixtral": "ParamWrapper does not support mixed adapter batches",
    "qwen3_moe": "ParamWrapper does not support mixed adapter batches",
    "deberta": "the rows cannot be found in the input of deberta.encoder.layer.0.attention.self.pos_proj",
    "deberta-v2": "the rows cannot be found in the input of deberta.encoder.layer.0.attention.self.query_proj",
}
"""Architectures with linear layers on which no mixed batch runs."""


def plain_lora(folder: Path, seed: int, **kwargs: Any) -> PeftModel:
    """Saves a plain LoRA adapter and returns its model."""
    model = get_peft_model(TINY["llama"].base(), LoraConfig(task_type="CAUSAL_LM", **kwargs))
    randomize(model, std=0.2, seed=seed).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("architecture", [*CAUSAL, *ENCODERS, *SEQ2SEQ])
def test_the_output_is_that_of_peft_in_a_mixed_batch_too(architecture: str, tmp_path: Path) -> None:
    names = ["second", BASE_ROWS, "first", "second"]
    batch = {"input_ids": tokens(len(names))}
    if architecture in SEQ2SEQ:
        batch["decoder_input_ids"] = tokens(len(names), 4, seed=1)
    expected = {BASE_ROWS: logits(tiny(architecture), batch)}
    for seed, (name, kwargs) in enumerate(VARIANTS.items(), 1):
        plain = get_peft_model(tiny(architecture), LoraConfig(**kwargs))
        randomize(plain, std=0.2, seed=seed).save_pretrained(tmp_path / name)
        expected[name] = logits(plain.eval(), batch)
    model = get_peft_model(tiny(architecture), FanLoraConfig()).eval()
    for name in VARIANTS:
        load_tenant(model, tmp_path / name, name)
        model.set_adapter(name)
        _check(logits(model, batch), expected[name])
    if architecture in NOT_MIXED:
        with pytest.raises(ValueError, match=NOT_MIXED[architecture]):
            model(**batch, adapter_names=names)
        return
    found = logits(model, {**batch, "adapter_names": names})
    for row, name in enumerate(names):
        _check(found[row], expected[name][row])


def _check(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() < 1e-5 * max(1, expected.abs().max())


def test_they_run_in_the_stacks(tmp_path: Path) -> None:
    plain_lora(tmp_path, 1, target_modules="all-linear", r=3)
    model = fanlora().eval()
    load_tenant(model, tmp_path, "lora")
    logits(model, {**TINY["llama"].batch(rows=2), "adapter_names": ["lora", "default"]})
    batch = next(iter(model.base_model._batches._last.values()))
    assert len(batch.stacks) == 21
    assert not batch.others
    assert all(isinstance(stack, AdapterStack) for stack in batch.stacks.values())


@pytest.mark.parametrize(
    "kwargs",
    [
        {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}, "alpha_pattern": {"q_proj": 11}},
        {"target_modules": r".*layers\.[01]\..*(v|down)_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["embed_tokens", "o_proj"]},
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ],
    ids=str,
)
def test_each_field_is_kept(kwargs: dict[str, Any], tmp_path: Path) -> None:
    batch = TINY["llama"].batch()
    expected = logits(plain_lora(tmp_path, 3, **kwargs), batch)
    loaded = PeftModel.from_pretrained(TINY["llama"].base(), tmp_path, config=FanLoraConfig.from_lora(tmp_path)).eval()
    assert loaded.peft_config["default"].peft_type == "FANLORA"
    torch.testing.assert_close(logits(loaded, batch), expected)
    tenant = fanlora().eval()
    tenant.load_adapter(tmp_path, "lora")
    tenant.set_adapter("lora")
    torch.testing.assert_close(logits(tenant, batch), expected)


def test_scored_pruned_and_exported(tmp_path: Path) -> None:
    batch = TINY["llama"].batch()
    original = plain_lora(tmp_path / "lora", 4, target_modules="all-linear")
    model = fanlora().eval()
    load_tenant(model, tmp_path / "lora", "lora")
    scores = model.score_modules([{**batch, "labels": batch["input_ids"]}], adapter_name="lora", progress=False)
    setting = model.prune_modules(scores.select(keep=2), adapter_name="lora")
    assert len(setting.kept) == 6
    export_lora(model, tmp_path / "plain", adapter_name="lora")
    plain = PeftModel.from_pretrained(TINY["llama"].base(), tmp_path / "plain").eval()
    assert plain.peft_config["default"].peft_type == "LORA"
    with torch.no_grad():
        for name, module in original.named_modules():
            if isinstance(module, LoraLayer) and name.removeprefix("base_model.model.") not in setting.names:
                module.scaling["default"] = 0.0
    torch.testing.assert_close(logits(plain, batch), logits(original, batch))
    torch.testing.assert_close(alone(model, batch, 0, "lora", by_peft=False), logits(original, batch)[0])


def test_a_trainable_one_is_trained(tmp_path: Path) -> None:
    plain_lora(tmp_path, 5, target_modules=["q_proj"])
    model = fanlora(target_modules=["v_proj"])
    model.load_adapter(tmp_path, "frozen")
    model.load_adapter(tmp_path, "trained", is_trainable=True)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any(".trained." in name for name in trained)
    assert not any(".frozen." in name for name in trained)


def test_what_cannot_be_honoured_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    plain_lora(tmp_path, 6, target_modules=["q_proj"], bias="lora_only")
    model = fanlora().eval()
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="does not support bias='lora_only'"):
        load_tenant(model, tmp_path, "lora")
    assert set(model.state_dict()) == before
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="is of type FANLORA: pass a LoRA adapter"):
        FanLoraConfig.from_lora(FanLoraConfig())
