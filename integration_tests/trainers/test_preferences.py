"""DPO, KTO and reward models: policy and reference passes, and prompts that no answer leaks into."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from integration_tests.helpers.models import METHODS
from integration_tests.helpers.text import tokenizer
from integration_tests.helpers.training import (
    END_OF_PROMPT,
    adapted,
    answer,
    arguments,
    assistant,
    base,
    check_no_leak,
    check_only_the_adapter_moved,
    check_resumes,
    check_saved,
    config,
    dpo,
    implicit_pairs,
    losses,
    pairs,
    question,
    rows,
    snapshot,
    user,
)


def conversational_pairs(row: int) -> dict[str, Any]:
    return {
        "prompt": user(question(row)),
        "chosen": assistant(answer(row)),
        "rejected": assistant(answer(row, wrong=True)),
    }


def judged(row: int) -> dict[str, Any]:
    good = row % 2 == 0
    return {"prompt": question(row), "completion": f" {answer(row, wrong=not good)}", "label": good}


def completion_starts(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return (batch["completion_mask"].cumsum(1) == 0) & batch["attention_mask"].bool()


@pytest.mark.support("DPO")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (pairs, {}),
        (implicit_pairs, {}),
        (conversational_pairs, {}),
        (pairs, {"precompute_ref_log_probs": True}),
        (pairs, {"loss_type": "ipo"}),
        (pairs, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
    ids=["standard", "implicit prompt", "conversational", "precomputed reference", "IPO", "reentrant"],
)
def test_dpo(method: str, make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    run = dpo(method, tmp_path, make, **options)
    before = snapshot(run.model)
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    check_only_the_adapter_moved(run.model, before)
    found = losses(run)
    assert found[-1] < found[0] * 0.9, found
    margins = [entry["rewards/margins"] for entry in run.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5)  # the fresh adapter is the reference
    assert margins[-1] > 0.05
    check_saved(run, tmp_path / "saved", base())
    if method == "PARA":
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        check_no_leak(run.model, {**batch, "labels": labels}, completion_starts(batch))


@pytest.mark.support("DPO, trained adapter as reference")
@pytest.mark.parametrize("method", METHODS)
def test_dpo_continues_from_a_trained_adapter(method: str, tmp_path: Path) -> None:
    """TRL keeps a frozen copy of the adapter beside it, and switches between the two in every step."""
    first = dpo(method, tmp_path / "first")
    first.train()
    first.save_model(str(tmp_path / "first"))
    trained = PeftModel.from_pretrained(base(), tmp_path / "first", is_trainable=True)
    run = dpo(method, tmp_path / "second", model=trained)
    assert set(run.model.peft_config) == {"default", "ref"}
    before = snapshot(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)
    margins = [entry["rewards/margins"] for entry in run.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-5) and margins[-1] > 0.05


@pytest.mark.support("DPO, resume from a checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_resuming_dpo(method: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    check_resumes(lambda folder: dpo(method, folder, **options), tmp_path, 2)


def kto(method: str, folder: Path, **options: Any) -> KTOTrainer:
    torch.manual_seed(0)
    return KTOTrainer(
        base(),
        args=KTOConfig(**arguments(folder, **options)),
        train_dataset=rows(judged),
        processing_class=tokenizer(),
        peft_config=config(method, task_type="CAUSAL_LM"),
    )


@pytest.mark.support("KTO")
@pytest.mark.parametrize("method", METHODS)
def test_kto(method: str, tmp_path: Path) -> None:
    run = kto(method, tmp_path, max_steps=12)
    before = snapshot(run.model)
    batch = next(iter(run.get_train_dataloader()))
    run.train()
    check_only_the_adapter_moved(run.model, before)
    found = losses(run)
    assert sum(found[-4:]) < sum(found[:4]) * 0.95, found
    check_saved(run, tmp_path / "saved", base())
    if method == "PARA":
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        check_no_leak(run.model, {**batch, "labels": labels}, completion_starts(batch))


@pytest.mark.support("KTO, resume from a checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_resuming_kto(method: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    check_resumes(lambda folder: kto(method, folder, **options), tmp_path, 2)


def reward(method: str, folder: Path, **options: Any) -> RewardTrainer:
    torch.manual_seed(0)
    model = base("LlamaForSequenceClassification", num_labels=1)
    return RewardTrainer(
        adapted(method, model, "SEQ_CLS", modules_to_save=["score"]),
        args=RewardConfig(**arguments(folder, **options)),
        train_dataset=rows(implicit_pairs),
        processing_class=tokenizer(),
    )


@pytest.mark.support("Reward model")
@pytest.mark.parametrize("method", METHODS)
def test_reward_models(method: str, tmp_path: Path) -> None:
    """A reward model reads the whole answer, so that all its input is PARA's prompt."""
    run = reward(method, tmp_path, max_steps=12)
    before = snapshot(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)
    found = losses(run)
    assert sum(found[-4:]) < sum(found[:4]) * 0.9, found
    check_saved(run, tmp_path / "saved", base("LlamaForSequenceClassification", num_labels=1))


@pytest.mark.support("Reward model, resume from a checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_resuming_a_reward_model(method: str, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    check_resumes(lambda folder: reward(method, folder, **options), tmp_path, 2)


@pytest.mark.support("trainers that pass no labels")
@pytest.mark.parametrize("method", ["PARA"])
def test_a_preference_trainer_that_passes_no_labels(method: str, tmp_path: Path) -> None:
    """Trainers that compute their losses from plain logits need the config to say how prompts end."""

    class Plain(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> torch.Tensor:
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            log_probs = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.log_softmax(-1)
            chosen = log_probs[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            total = (chosen * inputs["completion_mask"][:, 1:]).sum(1)
            good, bad = total.chunk(2)
            return -torch.nn.functional.logsigmoid(good - bad).mean()

    def run(end: list[int] | None) -> Plain:
        return Plain(
            adapted(method, prompt_end_token_ids=end),
            args=DPOConfig(**arguments(tmp_path, max_steps=3)),
            train_dataset=rows(lambda row: {**pairs(row), "prompt": f"{question(row)} answer"}),
            processing_class=tokenizer(),
        )

    with pytest.raises(
        ValueError, match=r"the call has no labels.*prompt_mask.*get_prompt_end_token_ids\(tokenizer\)"
    ):
        run(None).train()
    trained = run(END_OF_PROMPT)
    before = snapshot(trained.model)
    trained.train()
    check_only_the_adapter_moved(trained.model, before)
