"""What LoRA's options and helpers do under FanLoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer, convert_to_lora
from peft.utils.hotswap import hotswap_adapter
from torch import nn

from integration_tests.helpers.models import config_of, generated, labelled, logits, randomize, tiny, tokens
from peft_fanlora import FanLoraConfig, FanLoraSetting, export_lora


VARIANTS: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA, fast": {"init_lora_weights": "pissa_niter_4"},
    "OLoRA": {"init_lora_weights": "olora"},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "Gaussian": {"init_lora_weights": "gaussian"},
    "`rank_pattern`, `alpha_pattern`": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 4}},
    "`lora_bias`": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.1},
    "`layer_replication`": {"layer_replication": [(0, 2), (1, 2)]},
    "`trainable_token_indices`": {"trainable_token_indices": [5, 6]},
}
NOT_PLAIN_LORA = {
    "DoRA": "DoraLinearVariant",
    "PiSSA": "init_lora_weights='pissa'",
    "PiSSA, fast": "init_lora_weights='pissa_niter_4'",
    "OLoRA": "init_lora_weights='olora'",
    "`lora_bias`": "no lora_bias",
    "`layer_replication`": "no layer_replication",
    "`trainable_token_indices`": "no trainable_token_indices",
}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def fresh(**fields: Any) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(tiny("llama"), config_of("FanLoRA", **fields))
    if fields.get("init_lora_weights") == "eva":
        initialize_lora_eva_weights(model, [{"input_ids": tokens(4, 9), "attention_mask": torch.ones(4, 9)}] * 2)
    return model


def trained(model: PeftModel) -> PeftModel:
    """Takes a few steps, after which every module matters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for seed in range(3):
        model.train()(input_ids=tokens(4, 9, seed), labels=labelled(tokens(4, 9, seed))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def support(values: dict[str, Any]) -> list[Any]:
    """Returns the parameters of a test, each marked with its row of the support table."""
    return [pytest.param(key, marks=pytest.mark.support(f"LoRA's variants: {key}")) for key in values]


@pytest.mark.parametrize("variant", support(VARIANTS))
def test_a_variant_trains_scores_prunes_and_is_loaded_again(variant: str, tmp_path: Path) -> None:
    model = fresh(**VARIANTS[variant])
    if variant not in ("`layer_replication`", "`lora_bias`"):
        close(logits(model.eval()), logits(tiny("llama")))
    how: dict[str, Any] = {}
    if variant == "PiSSA, fast":  # a randomised decomposition comes out differently each time, so that it is converted
        model.save_pretrained(tmp_path / "initial")
        how = {"path_initial_model_for_weight_conversion": str(tmp_path / "initial")}
    trained(model)
    batch = {"input_ids": tokens(4, 9), "labels": labelled(tokens(4, 9))}
    scores = model.score_modules([batch], progress=False, num_points=32)
    assert len(scores) == 7 * len(model.base_model.model.model.layers)
    assert sum(scores.values()) > 0
    setting = model.prune_modules(scores.select(keep=2))
    assert len(setting.kept) == 2 * len(model.base_model.model.model.layers)
    pruned = logits(model)
    answer = generated(model)
    model.save_pretrained(tmp_path / "adapter", **how)
    again = PeftModel.from_pretrained(tiny("llama"), tmp_path / "adapter", is_trainable=True).eval()
    close(logits(again), pruned)
    assert generated(again) == answer
    trained(again)
    assert not torch.allclose(logits(again), pruned)


@pytest.mark.support(
    "LoRA's variants: export of all except rsLoRA, EVA, orthogonal and Gaussian initialisations", refused=True
)
@pytest.mark.parametrize("variant", NOT_PLAIN_LORA)
def test_export_refuses_what_the_target_cannot_read(variant: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=NOT_PLAIN_LORA[variant]):
        export_lora(trained(fresh(**VARIANTS[variant])), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@pytest.mark.support("export of rsLoRA, `rank_pattern`, `alpha_pattern`, EVA, orthogonal and Gaussian initialisations")
@pytest.mark.parametrize("variant", sorted(set(VARIANTS) - set(NOT_PLAIN_LORA)))
def test_the_others_are_exported(variant: str, tmp_path: Path) -> None:
    model = trained(fresh(**VARIANTS[variant]))
    export_lora(model, tmp_path)
    close(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()), logits(model))


@pytest.mark.support("`target_parameters` on the experts of a mixture")
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_experts_of_a_mixture(architecture: str, tmp_path: Path) -> None:
    """LoRA on the experts trains and is saved; only the attention's modules are candidates."""

    def base() -> nn.Module:
        return tiny(architecture)

    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(base(), config_of("FanLoRA", target_parameters=experts))
    assert any("experts" in name and p.requires_grad for name, p in model.named_parameters())
    trained(model)
    batch = {"input_ids": tokens(4, 9), "labels": labelled(tokens(4, 9))}
    scores = model.score_modules([batch], progress=False)
    assert not any("experts" in name for name in scores)
    model.prune_modules(scores.select(keep=2))
    assert any("experts" in name and "lora_" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))


def two_on_one_setting() -> tuple[PeftModel, FanLoraSetting]:
    names = ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    setting = FanLoraSetting.from_modules(tiny("llama"), names)
    model = randomize(get_peft_model(tiny("llama"), config_of("FanLoRA", setting=setting)))
    model.add_adapter("second", config_of("FanLoRA", setting=setting))
    return randomize(model, "second", seed=9).eval(), setting


@pytest.mark.support("hot-swapping (`peft.utils.hotswap`) of adapters that share a setting")
def test_hot_swapping(tmp_path: Path) -> None:
    model, _ = two_on_one_setting()
    model.save_pretrained(tmp_path)
    expected = {}
    for name in ("default", "second"):
        model.set_adapter(name)
        expected[name] = logits(model)
    assert not torch.allclose(expected["default"], expected["second"])
    served = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    close(logits(served), expected["default"])
    hotswap_adapter(served, str(tmp_path / "second"), adapter_name="default", torch_device="cpu")
    close(logits(served), expected["second"])
    hotswap_adapter(served, str(tmp_path), adapter_name="default", torch_device="cpu")
    close(logits(served), expected["default"])

    other = FanLoraSetting.from_modules(tiny("llama"), ["model.layers.1.mlp.down_proj"])
    elsewhere = randomize(get_peft_model(tiny("llama"), config_of("FanLoRA", setting=other)))
    elsewhere.save_pretrained(tmp_path / "elsewhere")
    with pytest.raises(RuntimeError, match="unexpected keys"):
        hotswap_adapter(served, str(tmp_path / "elsewhere"), adapter_name="default", torch_device="cpu")
    close(logits(served), expected["default"])


@pytest.mark.support("`add_weighted_adapter`")
@pytest.mark.parametrize("combination", ["linear", "cat", "svd", "ties", "dare_linear", "magnitude_prune"])
def test_weighted_combinations(combination: str, tmp_path: Path) -> None:
    model, _ = two_on_one_setting()
    model.add_weighted_adapter(["default", "second"], [1.0, 0.5], "both", combination_type=combination, density=0.9)
    model.set_adapter("both")
    combined = logits(model)
    assert torch.isfinite(combined).all()
    if combination == "cat":  # the sum of the two deltas, exactly
        model.base_model.set_adapter(["default", "second"])
        for layer in model.modules():
            if isinstance(layer, LoraLayer) and "second" in layer.scaling:
                layer.set_scale("second", 0.5)
        close(combined, logits(model))
    model.set_adapter("both")
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    close(logits(PeftModel.from_pretrained(tiny("llama"), tmp_path / "both").eval()), combined)


@pytest.mark.support("`convert_to_lora`")
def test_conversion_to_lora() -> None:
    model, _ = two_on_one_setting()
    config, tensors = convert_to_lora(model, rank=4)
    converted = get_peft_model(tiny("llama"), LoraConfig(**{**config.to_dict(), "task_type": "CAUSAL_LM"}))
    converted.load_state_dict(
        {key.replace(".weight", ".default.weight"): value for key, value in tensors.items()}, strict=False
    )
    close(logits(converted.eval()), logits(model))


@pytest.mark.support("merging")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging(safe_merge: bool) -> None:
    model, _ = two_on_one_setting()
    expected = logits(model)
    model.merge_adapter(safe_merge=safe_merge)
    close(logits(model), expected)
    model.unmerge_adapter()
    close(logits(model), expected)
    close(logits(model.merge_and_unload(safe_merge=safe_merge)), expected)


def test_a_config_takes_what_lora_takes() -> None:
    assert isinstance(config_of("FanLoRA"), FanLoraConfig) and isinstance(config_of("FanLoRA"), LoraConfig)
