"""Prompts of one token and of thousands, rows of padding, rows without labels, and results that are the same each time."""

from typing import Any

import pytest
import torch

from integration_tests.helpers.models import (
    METHODS,
    TINY,
    adapted,
    fanlora,
    generate,
    gradients,
    labelled,
    leading,
    logits,
    tiny,
    tokens,
)
from peft_fanlora.fanlora.importance import SCORES


both = pytest.mark.parametrize("method", METHODS)


def with_a_row(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns a batch of two rows, and the same with a third that has no label, or nothing but padding."""
    ids = tokens(3)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labelled(ids)}
    batch["labels"][2] = -100
    if kind == "padding":
        batch["input_ids"][2] = batch["attention_mask"][2] = 0
    return {key: value[:2] for key, value in batch.items()}, batch


rows = pytest.mark.parametrize("kind", ["no label", "padding"])


@rows
@both
def test_a_row_without_labels_or_tokens_changes_nothing_for_the_others(method: str, kind: str) -> None:
    without, batch = with_a_row(kind)
    model = adapted(method)
    found, expected = logits(model, batch), logits(model, without)
    torch.testing.assert_close(found[:2], expected, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()
    model.train()
    losses = [model(**each).loss for each in (without, batch)]
    expected_gradients, found_gradients = (gradients(model, loss) for loss in losses)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, atol=1e-5, rtol=1e-4, msg=name)


@rows
@pytest.mark.parametrize("score", [name for name, score in SCORES.items() if score.needs_data])
def test_a_row_without_labels_or_tokens_changes_no_score(score: str, kind: str) -> None:
    model = fanlora()
    expected, found = (model.score_modules([batch], score, progress=False) for batch in with_a_row(kind))
    assert found.num_tokens == expected.num_tokens
    assert dict(found) == pytest.approx(dict(expected), rel=1e-4, abs=5e-6)


@pytest.mark.parametrize("score", SCORES)
def test_the_same_data_gives_the_same_scores_bit_for_bit(score: str) -> None:
    """In the same model twice, and in another with the same seed."""
    batches = [TINY["llama"].batch(seed=seed) for seed in range(2)]
    model = fanlora(lora_dropout=0.1)
    first, second, third = (
        each.score_modules(batches, score, progress=False) for each in (model, model, fanlora(lora_dropout=0.1))
    )
    assert list(first.items()) == list(second.items()) == list(third.items())
    assert first.select(2) == third.select(2)


def check_steps(model: Any, prompt: torch.Tensor, new: int, tolerance: float) -> None:
    """Compares cached generation with one pass that is given the answer."""
    found = generate(model, prompt, new)
    length = prompt.shape[1]
    mask = {"prompt_mask": leading(found.sequences[:, :-1], length)} if model.base_model.makes_vectors else {}
    expected = logits(model, {"input_ids": found.sequences[:, :-1], **mask})[:, length - 1 :]
    torch.testing.assert_close(torch.stack(found.logits, 1).float(), expected.float(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@both
def test_a_prompt_of_one_token(method: str, dtype: torch.dtype) -> None:
    check_steps(adapted(method, base=tiny("llama").to(dtype)), tokens(2, 1), 4, 1e-5 if dtype.itemsize == 4 else 0.1)


@both
def test_a_prompt_of_32768_tokens(method: str) -> None:
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    base = tiny("llama", **small, max_position_embeddings=40_000)
    check_steps(adapted(method, base=base), tokens(1, 32_768), 2, 1e-4)
