"""FanLoRA on SmolLM2-135M-Instruct, trained on real text just long enough that the modules differ."""

import copy
import random
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from scoring import batches
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration_tests.helpers.models import logits
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig


pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("real_model")]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An adapter on all 210 modules after six steps, also in a folder, with held-out and calibration batches."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder())
    rows = sorted(assets.glosses()[:400], key=lambda row: len(str(row)))[:36]
    random.Random(0).shuffle(rows)
    base = AutoModelForCausalLM.from_pretrained(assets.model_folder(), dtype=torch.float32)
    model = get_peft_model(base, FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    for batch in batches(rows[12:], tokenizer, size=4):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    held_out, calibration = batches(rows[:8], tokenizer, size=8), batches(rows[8:12], tokenizer, size=4)
    scores = model.eval().score_modules(calibration, num_points=8, progress=False)
    return {"model": model, "folder": folder, "held_out": held_out, "calibration": calibration, "scores": scores}


def copied(trained: dict[str, Any]) -> PeftModel:
    return copy.deepcopy(trained["model"])


def loss(model: PeftModel, batches: list[dict[str, torch.Tensor]]) -> float:
    counts = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
    with torch.no_grad():
        losses = [model(**batch).loss.item() for batch in batches]
    return sum(value * count for value, count in zip(losses, counts, strict=True)) / sum(counts)


def test_path_sums_to_what_the_adapter_gains(trained: dict[str, Any]) -> None:
    model = copied(trained)
    after = loss(model, trained["calibration"])
    with model.disable_adapter():
        before = loss(model, trained["calibration"])
    assert len(trained["scores"]) == 210
    assert after < before - 0.3
    assert sum(trained["scores"].values()) == pytest.approx(before - after, rel=3e-2)  # eight points


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_each_row_of_a_mixed_batch_is_what_its_adapter_alone_gives(method: str) -> None:
    """A few activations of a real model are hundreds of times as large as the others."""
    config = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}[method]
    base = AutoModelForCausalLM.from_pretrained(assets.model_folder(), dtype=torch.float32)
    model = get_peft_model(base, config(r=4, task_type="CAUSAL_LM")).eval()
    model.add_adapter("two", config(r=4, task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or ".up_" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder(), padding_side="left")
    texts = ["The capital of France is", "Roses are red,", "Once upon a time there was a girl who"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    names = ["two", "default", "two"]
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    mixed = model.generate(**batch, adapter_names=names, **options)
    for row, name in enumerate(names):
        model.set_adapter(name)
        alone = model.generate(**tokenizer(texts[row], return_tensors="pt"), **options)
        assert mixed.sequences[row, -4:].equal(alone.sequences[0, -4:])
        for found, expected in zip(mixed.logits, alone.logits, strict=True):
            torch.testing.assert_close(found[row], expected[0], rtol=1e-3, atol=1e-3)


def test_the_score_beats_every_random_draw(trained: dict[str, Any]) -> None:
    model = copied(trained)
    model.prune_modules(trained["scores"].select(keep=2))
    by_score = loss(model, trained["held_out"])
    generator = random.Random(0)
    for _ in range(3):
        other = copied(trained)
        names = [
            name
            for layer in range(30)
            for name in generator.sample([name for name in trained["scores"] if f".layers.{layer}." in name], 2)
        ]
        other.prune_modules(FanLoraSetting.from_modules(other.get_base_model(), names))
        assert by_score < loss(other, trained["held_out"])


def test_a_pruned_adapter_is_loaded_again(trained: dict[str, Any], tmp_path: Path) -> None:
    model = copied(trained)
    model.prune_modules(trained["scores"].select(keep=2))
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    batch = trained["held_out"][0]
    torch.testing.assert_close(logits(loaded, batch), logits(model, batch), rtol=0, atol=1e-5)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 0.45 * (
        trained["folder"] / "adapter_model.safetensors"
    ).stat().st_size
