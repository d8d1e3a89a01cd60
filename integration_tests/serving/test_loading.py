"""Weights are loaded into the places that they were saved from: in parts, over other adapters, from older versions."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn

from integration_tests.helpers.models import LLAMA, TINY, fanlora, logits, randomize
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, load_tenant
from peft_fanlora.fanlora.candidates import lora_modules


BATCH = TINY["llama"].batch()


@pytest.mark.parametrize("config", [FanLoraConfig, LoraConfig])
def test_two_shards_are_one_adapter(config: Any) -> None:
    """Loading one shard once pruned the modules of the other."""
    whole = fanlora()
    state = get_peft_model_state_dict(whole)
    names = sorted(state)
    model = get_peft_model(TINY["llama"].base(), config(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    for part in (names[:10], names[10:]):
        set_peft_model_state_dict(model, {name: state[name] for name in part})
    assert len(lora_modules(model.get_base_model(), "default")) == 21
    torch.testing.assert_close(logits(model.eval(), BATCH), logits(whole, BATCH))


def test_a_checkpoint_with_fewer_modules_prunes_by_its_setting_alone(tmp_path: Path) -> None:
    """A file that lacks tensors is not a pruned adapter; a saved setting says that one is."""
    model = fanlora()
    model.save_pretrained(tmp_path / "torn")
    file = tmp_path / "torn" / "adapter_model.safetensors"
    save_file(dict(sorted(load_file(file).items())[:10]), file)
    fresh = fanlora()
    fresh.load_adapter(tmp_path / "torn", "default")
    assert len(lora_modules(fresh.get_base_model(), "default")) == 21

    setting = model.prune_modules(model.score_modules([BATCH], progress=False).select(2))
    expected = logits(model, BATCH)
    model.save_pretrained(tmp_path / "pruned")
    for subfolder in (False, True):
        fresh = fanlora()
        path = {"subfolder": "pruned"} if subfolder else {}
        with pytest.warns(UserWarning, match="saved after pruning, with 6 of the 21 modules of adapter 'default'"):
            fresh.load_adapter(tmp_path if subfolder else tmp_path / "pruned", "default", **path)
        assert fresh.peft_config["default"].setting == setting  # with its scores
        assert torch.equal(logits(fresh.eval(), BATCH), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_adapter(tmp_path / "pruned", "default")


def test_pruning_one_adapter_on_loading_leaves_the_others(tmp_path: Path) -> None:
    model = fanlora()
    model.prune_modules(model.score_modules([BATCH], progress=False).select(2))
    model.save_pretrained(tmp_path)
    other = fanlora()
    other.add_adapter("second", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(other)
    other.set_adapter("second")
    before = logits(other, BATCH)
    with pytest.warns(UserWarning, match="saved after pruning"):
        load_tenant(other, tmp_path, "default")
    assert torch.equal(logits(other.eval(), BATCH), before)
    assert len(lora_modules(other.get_base_model(), "second")) == 21
    other.set_adapter("default")
    torch.testing.assert_close(logits(other, BATCH), logits(model, BATCH))


def test_a_checkpoint_on_other_modules_is_refused(tmp_path: Path) -> None:
    base = TINY["llama"].base()
    first, second = (FanLoraSetting.from_modules(base, [f"model.layers.{layer}.mlp.up_proj"]) for layer in range(2))
    fanlora(setting=first).save_pretrained(tmp_path)
    model = fanlora(setting=second)
    before = logits(model, BATCH)
    with pytest.raises(ValueError, match=r"keeps 'model.layers.0.mlp.up_proj', which adapter 'default' does not"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model, BATCH), before)


def test_a_setting_for_a_trained_adapter_takes_its_modules_out_of_the_file(tmp_path: Path) -> None:
    """A warning names what is left out."""
    model = fanlora()
    model.save_pretrained(tmp_path)
    setting = FanLoraSetting.from_modules(model.get_base_model(), ["model.layers.0.mlp.up_proj"])
    with pytest.warns(
        UserWarning, match="40 of the 42 tensors to load, such as .* have no place in adapter 'default'"
    ):
        loaded = PeftModel.from_pretrained(TINY["llama"].base(), tmp_path, config=FanLoraConfig(r=4, setting=setting))
    model.prune_modules(setting)
    torch.testing.assert_close(logits(loaded.eval(), BATCH), logits(model, BATCH))


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_an_adapter_without_a_matching_tensor_is_refused(method: str, tmp_path: Path) -> None:
    """It would compute exactly the base model, without a warning."""
    config: Any = FanLoraConfig(r=2) if method == "FanLoRA" else ParaConfig(r=2)
    get_peft_model(TINY["llama"].base(), config).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name.replace(".layers.", ".blocks."): tensor for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="have no place in adapter 'default': it would have no effect"):
        PeftModel.from_pretrained(TINY["llama"].base(), tmp_path)
    model = get_peft_model(TINY["llama"].base(), config)
    before = list(model.state_dict())
    for load in (model.load_adapter, lambda *args: load_tenant(model, *args)):
        with pytest.raises(ValueError, match="have no place in adapter 'second'"):
            load(tmp_path, "second")
        assert list(model.peft_config) == ["default"]
        assert list(model.state_dict()) == before


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_an_adapter_of_other_shapes_leaves_the_model_as_it_was(method: str, tmp_path: Path) -> None:
    config: Any = FanLoraConfig if method == "FanLoRA" else ParaConfig
    get_peft_model(TINY["llama"].base(hidden_size=24), config(r=2)).save_pretrained(tmp_path)
    model = get_peft_model(TINY["llama"].base(), config(r=2))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_tenant(model, tmp_path, "second")
    assert list(model.peft_config) == ["default"]
    assert not any(".second." in name for name in model.state_dict())


def llava() -> nn.Module:
    torch.manual_seed(0)
    text = {**LLAMA, "num_hidden_layers": 2}
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = tf.LlavaConfig(
        text_config=tf.LlamaConfig(**text),
        vision_config=tf.CLIPVisionConfig(**vision, image_size=4, patch_size=2, projection_dim=8),
        image_token_index=1,
    )
    return tf.LlavaForConditionalGeneration(config).eval()


def as_saved_by_earlier_versions(folder: Path) -> None:
    """The language model was `language_model.model`, and is `model.language_model` now."""
    file = folder / "adapter_model.safetensors"
    new, old = "base_model.model.model.language_model.", "base_model.model.language_model.model."
    tensors = {name.replace(new, old): tensor for name, tensor in load_file(file).items()}
    assert all(old in name for name in tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_an_old_lora_of_a_renamed_model_loads_as_fanlora(tmp_path: Path) -> None:
    """PEFT converts its names for the type LORA alone; as FanLoRA it computed exactly the base model."""
    trained = get_peft_model(llava(), LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|up_proj)"))
    randomize(trained)
    trained.save_pretrained(tmp_path)
    as_saved_by_earlier_versions(tmp_path)
    batch = {"input_ids": torch.arange(3, 12)[None]}
    expected = logits(PeftModel.from_pretrained(llava(), tmp_path).eval(), batch)
    torch.testing.assert_close(expected, logits(trained.eval(), batch))
    assert not torch.allclose(expected, logits(llava(), batch))

    fields = LoraConfig.from_pretrained(tmp_path).to_dict()
    del fields["peft_type"]
    loaded = PeftModel.from_pretrained(llava(), tmp_path, config=FanLoraConfig(**fields))
    torch.testing.assert_close(logits(loaded.eval(), batch), expected)
    injected = llava()
    injected.load_adapter(tmp_path, peft_config=FanLoraConfig(**fields))
    torch.testing.assert_close(logits(injected.eval(), batch), expected)


def test_an_old_para_adapter_of_a_renamed_model(tmp_path: Path) -> None:
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    trained = get_peft_model(llava(), ParaConfig(r=2, target_modules=targets, init_para_weights=False))
    trained.save_pretrained(tmp_path)
    as_saved_by_earlier_versions(tmp_path)
    batch = {"input_ids": torch.arange(3, 12)[None]}
    loaded = PeftModel.from_pretrained(llava(), tmp_path)
    torch.testing.assert_close(logits(loaded.eval(), batch), logits(trained.eval(), batch))


def mixtral() -> nn.Module:
    torch.manual_seed(0)
    config = {**LLAMA, "num_hidden_layers": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
    return tf.MixtralForCausalLM(tf.MixtralConfig(**config)).eval()


def test_an_old_lora_on_experts_loads_as_fanlora(tmp_path: Path) -> None:
    """PEFT fuses the LoRA of experts that were modules once, weights and configuration, for the type LORA alone."""
    config = LoraConfig(r=2, target_modules=["q_proj", "w1", "w2", "w3"])
    shapes = {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16)}
    tensors = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        block = f"base_model.model.model.layers.{layer}"
        names = {f"{block}.block_sparse_moe.experts.{e}.{w}": shapes[w] for e in range(3) for w in shapes}
        for name, (inputs, outputs) in (names | {f"{block}.self_attn.q_proj": (16, 16)}).items():
            tensors[f"{name}.lora_A.weight"] = torch.randn(2, inputs, generator=generator)
            tensors[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator)
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(tmp_path))
    expected = logits(PeftModel.from_pretrained(mixtral(), tmp_path).eval(), BATCH)
    assert not torch.allclose(expected, logits(mixtral(), BATCH))
    fields = LoraConfig.from_pretrained(tmp_path).to_dict()
    del fields["peft_type"]
    loaded = PeftModel.from_pretrained(mixtral(), tmp_path, config=FanLoraConfig(**fields))
    torch.testing.assert_close(logits(loaded.eval(), BATCH), expected)


def test_names_of_today_are_not_taken_for_old_ones(tmp_path: Path) -> None:
    """Qwen2-MoE's shared expert is made of modules that have the names of the old experts'."""
    torch.manual_seed(0)
    config = {**LLAMA, "num_hidden_layers": 2, "num_experts": 3, "num_experts_per_tok": 2}
    config |= {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
    bases = [tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**config)) for _ in range(2)]
    bases[1].load_state_dict(bases[0].state_dict())
    model = get_peft_model(bases[0], FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model)
    names = ["model.layers.0.mlp.shared_expert.gate_proj", "model.layers.1.self_attn.q_proj"]
    model.prune_modules(FanLoraSetting.from_modules(bases[0], names))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bases[1], tmp_path)
    assert not loaded.peft_config["default"].target_parameters
    torch.testing.assert_close(logits(loaded.eval(), BATCH), logits(model.eval(), BATCH))
