"""Quantised base models: training, scoring, pruning, saving, loading and generation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, prepare_model_for_kbit_training

from integration_tests.helpers.models import config_of, generated, labelled, logits, saved_base, tokens
from peft_fanlora import FanLoraConfig


def bitsandbytes(**bits: Any) -> Any:
    pytest.importorskip("bitsandbytes")
    return tf.BitsAndBytesConfig(**bits)


def torchao(kind: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return tf.TorchAoConfig(getattr(quantization, kind)())


QUANTISATIONS: dict[str, Callable[[], Any]] = {
    "bitsandbytes, 4 bit": lambda: bitsandbytes(load_in_4bit=True),
    "bitsandbytes, 4 bit NF4 with double quantization": lambda: bitsandbytes(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "bitsandbytes, 8 bit": lambda: bitsandbytes(load_in_8bit=True),
    "torchao, int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
}


def quantised(folder: str, how: str) -> torch.nn.Module:
    """Loads a saved base model with quantised weights."""
    return tf.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QUANTISATIONS[how](), device_map="cpu", dtype=torch.float32
    )


def trained(model: PeftModel) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    batch = tokens(4, 9)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=batch, labels=labelled(batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    model.eval()


@pytest.mark.parametrize(
    "how", [pytest.param(how, marks=pytest.mark.support(f"base model in {how}")) for how in QUANTISATIONS]
)
@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
@pytest.mark.usefixtures("exact_bitsandbytes")
def test_a_quantised_base(method: str, how: str, tmp_path: Path) -> None:
    folder = saved_base(tmp_path, hidden_size=64, intermediate_size=64, head_dim=16)
    base = prepare_model_for_kbit_training(quantised(folder, how))
    model = get_peft_model(base, config_of(method))
    fresh = quantised(folder, how)
    assert torch.equal(logits(model.eval()), logits(fresh))
    before = {name: value.clone() for name, value in model.state_dict().items() if type(value) is torch.Tensor}
    trained(model)
    after = model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert moved and all("lora_" in name or "para_" in name for name in moved)
    if isinstance(model.peft_config["default"], FanLoraConfig):
        batch = {"input_ids": tokens(4, 9), "labels": labelled(tokens(4, 9))}
        scores = model.score_modules([batch], progress=False)
        assert len(scores) == 21 and sum(scores.values()) > 0
        model.prune_modules(scores.select(keep=2))
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(quantised(folder, how), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-5, rtol=1e-5)
    assert generated(loaded) == generated(model)
    auto = AutoPeftModelForCausalLM.from_pretrained(
        tmp_path / "adapter", quantization_config=QUANTISATIONS[how](), device_map="cpu", dtype=torch.float32
    )
    torch.testing.assert_close(logits(auto.eval()), logits(model), atol=1e-5, rtol=1e-5)


@pytest.mark.support("pruning OLoRA adapters on a quantised base", refused=True)
def test_pruning_olora_on_a_quantised_weight_is_refused(tmp_path: Path) -> None:
    folder = saved_base(tmp_path, hidden_size=64, intermediate_size=64, head_dim=16)
    model = get_peft_model(quantised(folder, "bitsandbytes, 4 bit"), config_of("FanLoRA", init_lora_weights="olora"))
    batch = {"input_ids": tokens(4, 9), "labels": labelled(tokens(4, 9))}
    scores = model.score_modules([batch], progress=False)
    before = logits(model.eval())
    with pytest.raises(ValueError, match="cannot be undone exactly"):
        model.prune_modules(scores.select(keep=2))
    assert torch.equal(logits(model), before)
