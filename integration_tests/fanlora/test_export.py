"""The exported adapter is plain LoRA: PEFT alone reads it, with the same output."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from integration_tests.helpers.models import TINY, fanlora, logits
from integration_tests.helpers.processes import OtherProcess
from peft_fanlora import FanLoraConfig, export_lora
from peft_fanlora.fanlora.reading import _hollow


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("export")]  # one worker makes what its tests share


@pytest.fixture(scope="module")
def plain_peft() -> Iterator[OtherProcess]:
    with OtherProcess() as process:
        yield process


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
def test_plain_peft_loads_it_with_the_same_logits(
    name: str, config: dict[str, Any], tmp_path: Path, plain_peft: OtherProcess
) -> None:
    tiny = TINY[name]
    base = tiny.base()
    base.save_pretrained(tmp_path / "base")
    model, batch = fanlora(name, **config), tiny.batch()
    model.prune_modules(model.score_modules([batch], num_points=2, progress=False).select(2))
    export_lora(model, tmp_path / "plain")
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert written["peft_type"] == "LORA"
    assert "setting" not in written
    assert not written["use_rslora"]
    assert not written["rank_pattern"]
    assert not written["alpha_pattern"]
    found = plain_peft.logits(type(base), tmp_path / "base", tmp_path / "plain", batch)
    torch.testing.assert_close(found, logits(model, batch), rtol=1e-5, atol=1e-5)
    assert plain_peft.modules == ["peft"]


def test_a_named_adapter(tmp_path: Path) -> None:
    model = fanlora()
    model.add_adapter("other", model.peft_config["default"])
    export_lora(model, tmp_path, adapter_name="other")
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_after_the_vocabulary_grew_no_embedding_is_exported(tmp_path: Path) -> None:
    """PEFT saves embeddings that are larger than the base model's on disk; vLLM and llama.cpp refuse them."""
    TINY["llama"].base().save_pretrained(tmp_path / "base")
    base = type(TINY["llama"].base()).from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(72)
    model = fanlora(base=base, target_modules=["q_proj", "up_proj", "lm_head"])
    export_lora(model, tmp_path / "plain")
    names = set(load_file(tmp_path / "plain" / "adapter_model.safetensors"))
    assert len(names) == 2 * (2 * 3 + 1)
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("fault", ["factor", "missing", "unexpected", "alpha", "targets", "head"])
def test_what_lora_reads_differently_is_not_exported(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a failure the reader finds the earlier export or none."""
    model = fanlora("bert")
    export_lora(model, tmp_path / "earlier")
    before = files(tmp_path / "earlier")

    def save(tensors: dict[str, torch.Tensor], path: Path, **arguments: Any) -> None:
        name = next(name for name in tensors if ("classifier" if fault == "head" else "lora_B") in name)
        if fault == "unexpected":
            tensors["base_model.model.bert.lora_A.weight"] = tensors[name].clone()
        elif fault == "missing":
            del tensors[name]
        elif fault in ("factor", "head"):
            tensors[name] = tensors[name] * 1.001
        save_file(tensors, path, **arguments)

    def save_config(self: LoraConfig, folder: str, **arguments: Any) -> None:
        if fault == "alpha":
            self.lora_alpha *= 1.001
        elif fault == "targets":
            self.target_modules = set(sorted(self.target_modules)[1:])
        original(self, folder, **arguments)

    original = LoraConfig.save_pretrained
    monkeypatch.setattr("peft_fanlora.fanlora.export.save_file", save)
    monkeypatch.setattr(LoraConfig, "save_pretrained", save_config)
    for folder in ("earlier", "new"):
        with pytest.raises(RuntimeError, match="loads an adapter from the export that differs"):
            export_lora(model, tmp_path / folder)
    assert files(tmp_path / "earlier") == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_low_and_high_precision_read_back(dtype: torch.dtype, tmp_path: Path) -> None:
    model = fanlora(rank_pattern={"up_proj": 2}, lora_alpha=3, use_rslora=True).to(dtype)
    export_lora(model, tmp_path)


@pytest.mark.parametrize("name", sorted(TINY))
def test_reading_back_needs_no_memory_for_the_base_model(name: str) -> None:
    model = fanlora(name)
    hollow = _hollow(model.get_base_model(), "default", {})
    heads = sum(p.numel() for p in hollow.parameters() if p.is_contiguous() and p.numel() > 1)
    assert sum(p.untyped_storage().nbytes() for p in hollow.parameters()) <= 4 * (
        heads + len(list(hollow.parameters()))
    )


def test_other_adapters_do_not_matter_and_no_random_number_is_drawn(tmp_path: Path) -> None:
    model = fanlora("bert")
    model.add_adapter("other", FanLoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    before = torch.get_rng_state()
    export_lora(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.support("export of adapters that plain LoRA cannot represent", refused=True)
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
        export_lora(fanlora(**config), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_refuses_other_models(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a PeftModel with a FanLoRA adapter, not a LlamaForCausalLM"):
        export_lora(TINY["llama"].base(), tmp_path)
    lora = get_peft_model(TINY["llama"].base(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="needs a PeftModel with a FanLoRA adapter"):
        export_lora(lora, tmp_path)
    merged = fanlora()
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        export_lora(merged, tmp_path)
