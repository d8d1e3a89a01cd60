"""Training, saving, loading and generation on every causal architecture."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model

from integration_tests.helpers.models import CAUSAL, GREEDY, adapted, config_of, labelled, logits, tiny, tokens


@pytest.mark.support("training")
@pytest.mark.support("saving and loading")
@pytest.mark.parametrize("architecture", sorted(CAUSAL))
@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_trains_and_is_loaded_again(method: str, architecture: str, tmp_path: Path) -> None:
    model = get_peft_model(tiny(architecture), config_of(method)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    batch, losses = {"input_ids": tokens(), "labels": labelled(tokens())}, []
    for _ in range(3):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name or "para_" in name for name in moved)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(architecture), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model), atol=1e-6, rtol=1e-6)


@pytest.mark.support("generation")
@pytest.mark.parametrize("architecture", sorted(CAUSAL))
@pytest.mark.parametrize("method", ["FanLoRA"])
@torch.no_grad()
def test_cached_generation_equals_one_teacher_forced_pass(method: str, architecture: str) -> None:
    model = adapted(method, architecture)
    prompt = tokens()
    made = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, **GREEDY
    )
    forced = logits(model, made.sequences)[:, prompt.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(made.logits, 1), forced, atol=1e-4, rtol=1e-4)
