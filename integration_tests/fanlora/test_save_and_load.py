"""Adapters survive saving and loading, before and after pruning, in this process and in a new one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file

from integration_tests.helpers.models import TINY, fanlora, logits
from integration_tests.helpers.processes import OtherProcess
from peft_fanlora import FanLoraConfig, FanLoraSetting


pytestmark = pytest.mark.slow


def saved_model(name: str, folder: Path, **config: Any) -> PeftModel:
    """A model whose base can be loaded again from a folder."""
    TINY[name].base().save_pretrained(folder / "base")
    base = type(TINY[name].base()).from_pretrained(folder / "base")
    return fanlora(name, base=base, **config)


def prune(model: PeftModel) -> FanLoraSetting:
    task = model.peft_config["default"].task_type
    name = {"SEQ_2_SEQ_LM": "t5", "SEQ_CLS": "bert"}.get(task, "llama")
    return model.prune_modules(model.score_modules([TINY[name].batch()], num_points=2, progress=False).select(2))


@pytest.mark.support("saving and loading")
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_round_trip(name: str, pruned: bool, tmp_path: Path) -> None:
    model, batch = saved_model(name, tmp_path), TINY[name].batch()
    if pruned:
        setting = prune(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    base = type(TINY[name].base()).from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded, batch), expected)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = {key.partition(".lora_")[0].removeprefix("base_model.model.") for key in tensors if "lora_" in key}
    if pruned:
        assert modules == set(setting.names) | TINY[name].others
        assert FanLoraSetting.from_pretrained(tmp_path / "adapter") == setting
        loaded.save_pretrained(tmp_path / "again")  # the setting is saved again
        assert FanLoraSetting.from_pretrained(tmp_path / "again") == setting
    else:
        assert len(modules - TINY[name].others) == TINY[name].num_modules
        assert not (tmp_path / "adapter" / "fanlora_setting.json").exists()


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"rank_pattern": {"mlp.up_proj": 2}},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_variants_round_trip_after_pruning(config: dict[str, Any], tmp_path: Path) -> None:
    model, batch = saved_model("llama", tmp_path, **config), TINY["llama"].batch()
    prune(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)


@pytest.mark.support("saving and loading")
def test_a_new_process_gives_the_same_logits(tmp_path: Path) -> None:
    model, batch = saved_model("llama", tmp_path), TINY["llama"].batch()
    prune(model)
    model.save_pretrained(tmp_path / "adapter")
    with OtherProcess("import peft_fanlora") as process:
        found = process.logits(type(TINY["llama"].base()), tmp_path / "base", tmp_path / "adapter", batch)
    assert torch.equal(found, logits(model, batch))


def test_a_pruned_adapter_beside_another(tmp_path: Path) -> None:
    model, batch = saved_model("llama", tmp_path), TINY["llama"].batch()
    prune(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    other = saved_model("llama", tmp_path)
    other.load_adapter(tmp_path / "adapter", "pruned")
    other.set_adapter("pruned")
    assert torch.equal(logits(other, batch), expected)


def test_a_pruned_checkpoint_over_an_unpruned_adapter(tmp_path: Path) -> None:
    """A trainer that resumes loads by name over a fresh adapter; its other modules must not stay behind."""
    model, batch = saved_model("llama", tmp_path), TINY["llama"].batch()
    setting = prune(model)
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    fresh = saved_model("llama", tmp_path)
    with pytest.warns(UserWarning, match="with 6 of the 21 modules of adapter .default."):
        fresh.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert torch.equal(logits(fresh.eval(), batch), expected)
    assert fresh.peft_config["default"].setting == setting


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_fresh_adapter_on_a_setting(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    model, batch = saved_model("llama", tmp_path), TINY["llama"].batch()
    setting = prune(model)
    fresh = fanlora(setting=setting, r=7)
    expected = logits(fresh, batch)
    fresh.save_pretrained(tmp_path / "fresh")
    base = TINY["llama"].base()
    loaded = PeftModel.from_pretrained(base, tmp_path / "fresh", low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(logits(loaded, batch), expected)
    assert loaded.peft_config["default"].setting == setting


@pytest.mark.support("`path_initial_model_for_weight_conversion`")
def test_pissa_converts_to_lora_on_the_original_weights(tmp_path: Path) -> None:
    """PEFT marks the initial adapter as such for its own LORA type only."""
    model, batch = saved_model("llama", tmp_path, init_lora_weights="pissa"), TINY["llama"].batch()
    untrained = FanLoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights="pissa")
    from peft import get_peft_model

    fresh = get_peft_model(TINY["llama"].base(), untrained)
    fresh.peft_config["default"].init_lora_weights = True
    fresh.save_pretrained(tmp_path / "initial")
    expected = logits(model, batch)
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    loaded = PeftModel.from_pretrained(TINY["llama"].base(), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-4)
