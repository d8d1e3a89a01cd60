"""The exported adapter is plain LoRA: PEFT alone reads it, with the same output."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, adapted, logits

from peft_fanlora import export_lora


PLAIN_PEFT = """
import sys, torch, transformers
from peft import PeftModel
base = getattr(transformers, sys.argv[1]).from_pretrained(sys.argv[2])
model = PeftModel.from_pretrained(base, sys.argv[3]).eval()
with torch.no_grad():
    torch.save(model(**torch.load(sys.argv[4])).logits, sys.argv[5])
assert "peft_fanlora" not in sys.modules
"""


@pytest.mark.support("export as plain LoRA")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("llama", {}),
        ("llama", {"use_rslora": True, "lora_alpha": 3}),
        ("llama", {"rank_pattern": {"up_proj": 2, "v_proj": 5}, "alpha_pattern": {r"1\..*": 3}, "use_rslora": True}),
        ("llama", {"init_lora_weights": "mica"}),
        ("gpt2", {}),
        ("bert", {"modules_to_save": None, "task_type": None}),
        ("bert", {}),
    ],
    ids=str,
)
def test_plain_peft_loads_it_with_the_same_logits(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    tiny = TINY[name]
    tiny.base().save_pretrained(tmp_path / "base")
    model, batch = adapted(name, **config), tiny.batch()
    model.prune_modules(model.score_modules([batch], num_points=2, progress=False).select(2))
    export_lora(model, tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert "setting" not in written
    assert not written["use_rslora"]
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    torch.save(batch, tmp_path / "batch.pt")
    paths = [str(tmp_path / part) for part in ("base", "plain", "batch.pt", "logits.pt")]
    subprocess.run([sys.executable, "-c", PLAIN_PEFT, tiny.model_class, *paths], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model, batch), rtol=0, atol=1e-6)


def test_a_named_adapter(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("other", model.peft_config["default"])
    export_lora(model, tmp_path, adapter_name="other")
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.support("export of what plain LoRA cannot say", refused=True)
@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "a DoraLinearVariant"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"modules_to_save": ["lm_head"]}, r"would lose \['lm_head'\]"),
        ({"trainable_token_indices": [1]}, "has no trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "up_proj"]}, "is for linear layers, model.embed_tokens is a Embedding"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refuses_more_than_plain_lora(config: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        export_lora(adapted(**config), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a PeftModel with a FanLoRA adapter, not a LlamaForCausalLM"):
        export_lora(TINY["llama"].base(), tmp_path)
    lora = get_peft_model(TINY["llama"].base(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="needs a PeftModel with a FanLoRA adapter"):
        export_lora(lora, tmp_path)
    merged = adapted()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_lora(merged, tmp_path)
