"""GRPO: rollouts by `generate`, then gradients on what was generated, under the same vectors."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from integration_tests.helpers.models import METHODS, VOCAB
from integration_tests.helpers.text import tokenizer
from integration_tests.helpers.training import (
    adapted,
    arguments,
    base,
    check_no_leak,
    check_only_the_adapter_moved,
    check_saved,
    config,
    question,
    rows,
    snapshot,
    user,
)


def low_words(completions: list[Any], **kwargs: Any) -> list[float]:
    """Rewards answers of words with low numbers: a dense reward that a few steps can raise."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    return [sum(float(word[1:]) < 20 for word in text.split() if word[1:].isdigit()) / 6 for text in texts]


def probability_of_low_words(model: torch.nn.Module) -> float:
    """What is rewarded, without the noise of samples: how likely an answer begins with such a word."""
    words = tokenizer()
    batch = words([question(row) for row in range(8)], padding=True, padding_side="left", return_tensors="pt")
    low = words.convert_tokens_to_ids([f"w{index}" for index in range(20)])
    training = model.training
    with torch.no_grad():
        logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    model.train(training)
    return float(logits[:, -1].softmax(-1)[:, low].sum(-1).mean())


def grpo(method: str, folder: Path, *, conversational: bool = False, model: Any = None, **options: Any) -> GRPOTrainer:
    torch.manual_seed(0)
    return GRPOTrainer(
        base() if model is None else model,
        reward_funcs=low_words,
        args=GRPOConfig(
            **arguments(
                folder,
                **{
                    "per_device_train_batch_size": 32,
                    "num_generations": 8,
                    "max_completion_length": 6,
                    "learning_rate": 5e-2 if method == "FanLoRA" else 1e-1,
                    "max_steps": 24,
                    **options,
                },
            )
        ),
        train_dataset=rows(lambda row: {"prompt": user(question(row)) if conversational else question(row)}),
        processing_class=tokenizer(),
        peft_config=config(method, task_type="CAUSAL_LM") if model is None else None,
    )


def rewards(run: GRPOTrainer) -> list[float]:
    return [entry["reward"] for entry in run.state.log_history if "reward" in entry]


@pytest.mark.support("GRPO")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "options",
    [{}, {"conversational": True}, {"beta": 0.01}, {"num_iterations": 2, "max_steps": 32}],
    ids=["standard", "conversational", "reference", "two iterations"],
)
def test_grpo(method: str, options: dict[str, Any], tmp_path: Path) -> None:
    run = grpo(method, tmp_path, **options)
    before, chance = snapshot(run.model), probability_of_low_words(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)
    assert probability_of_low_words(run.model) > chance + 0.01
    check_saved(run, tmp_path / "saved", base())


@pytest.mark.support("GRPO, trained adapter as reference")
@pytest.mark.parametrize("method", METHODS)
def test_grpo_continues_from_a_trained_adapter(method: str, tmp_path: Path) -> None:
    first = grpo(method, tmp_path / "first", max_steps=2)
    first.train()
    first.save_model(str(tmp_path / "first"))
    trained = PeftModel.from_pretrained(base(), tmp_path / "first", is_trainable=True)
    run = grpo(method, tmp_path / "second", model=trained, beta=0.1, max_steps=3)
    assert set(run.model.peft_config) == {"default", "ref"}
    before = snapshot(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)
    divergence = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
    assert divergence[0] == pytest.approx(0, abs=1e-6) and divergence[-1] > 0


@pytest.mark.support("GRPO, resume from a checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_resuming_grpo(method: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole, resumed = grpo(method, tmp_path, **options), grpo(method, tmp_path, **options)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rewards(resumed) == pytest.approx(rewards(whole))
    expected = snapshot(whole.model)
    for name, value in snapshot(resumed.model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.support("GRPO")
@pytest.mark.parametrize("method", ["PARA"])
def test_a_rollout_and_the_training_pass_see_the_same_prompt(method: str, tmp_path: Path) -> None:
    """Guards against training on other vectors than those that the tokens were drawn with."""
    run = grpo(method, tmp_path, num_iterations=2, max_steps=2)
    calls: list[dict[str, Any]] = []
    original = run._get_per_token_logps_and_entropies

    def watched(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, keep: int, *rest: Any, **k: Any):
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, :-keep] = -100
        calls.append({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        return original(model, input_ids, attention_mask, keep, *rest, **k)

    run._get_per_token_logps_and_entropies = watched
    run.train()
    batch = next(call for call in calls if (call["attention_mask"][:, 0] == 0).any())  # padded on the left
    check_no_leak(run.model, batch, (batch["labels"] == -100) & batch["attention_mask"].bool())

    # teacher-forced, in training mode, the model gives the logits that it generated with
    run.model.eval()
    prompt = (batch["labels"] == -100).all(0).nonzero()[-1].item() + 1
    generated = run.model.generate(
        input_ids=batch["input_ids"][:, :prompt],
        attention_mask=batch["attention_mask"][:, :prompt],
        max_new_tokens=4,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
        eos_token_id=VOCAB,
    )
    ids = generated.sequences
    mask = torch.cat([batch["attention_mask"][:, :prompt], torch.ones(len(ids), 4, dtype=torch.long)], 1)
    labels = ids.clone()
    labels[:, :prompt] = -100
    run.model.train()
    with torch.no_grad():
        forced = run.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).logits
    torch.testing.assert_close(forced[:, prompt - 1 : -1], torch.stack(generated.logits, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.support("GRPO and RLOO, continuous batching")
@pytest.mark.parametrize("trainer", ["GRPO", "RLOO"])
@pytest.mark.parametrize("method", METHODS)
def test_continuous_batching_draws_the_rollouts_that_generate_draws(method: str, trainer: str, tmp_path: Path) -> None:
    """Guards against rollouts under vectors of other prompts, or without the adapter."""
    trainer_class, config_class = {"GRPO": (GRPOTrainer, GRPOConfig), "RLOO": (RLOOTrainer, RLOOConfig)}[trainer]
    small = {"max_batch_tokens": 16, "num_blocks": 64, "page_size": 8}
    drawn: dict[bool, list[str]] = {}
    for batched in (False, True):
        model = adapted(method)
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape) * 0.4

        def rewards(completions: list[str], batched: bool = batched, **kwargs: Any) -> list[float]:
            drawn.setdefault(batched, []).extend(completions)
            return [float(index % 3) for index in range(len(completions))]

        run = trainer_class(
            model,
            reward_funcs=rewards,
            args=config_class(
                **arguments(
                    tmp_path,
                    per_device_train_batch_size=16,
                    num_generations=4,
                    max_completion_length=6,
                    max_steps=1,
                    top_k=1,  # greedy
                    use_transformers_continuous_batching=batched,
                    transformers_continuous_batching_config=small if batched else None,
                )
            ),
            train_dataset=rows(lambda row: {"prompt": question(row)}),
            processing_class=tokenizer(),
        )
        before = snapshot(run.model)
        run.train()
        check_only_the_adapter_moved(run.model, before)
    assert len(set(drawn[False])) > 2
    assert drawn[True] == drawn[False]
