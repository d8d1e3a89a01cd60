"""FanLoraCallback in TRL's trainers: every form of SFT data, and preferences, whose batches have no labels."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from packaging.version import Version
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling
from trl import DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from integration_tests.helpers.text import tokenizer
from integration_tests.helpers.training import (
    adapted,
    answer,
    arguments,
    assistant,
    base,
    check_saved,
    dpo,
    implicit_pairs,
    pairs,
    question,
    rows,
    user,
)
from peft_fanlora import FanLoraCallback


def labelled() -> DataLoader:
    words = tokenizer()
    texts = [words(f"{question(row)} {answer(row)}") for row in range(8)]
    return DataLoader(texts, batch_size=4, collate_fn=DataCollatorForLanguageModeling(words, mlm=False))


def pruning(data: Any, **others: Any) -> FanLoraCallback:
    return FanLoraCallback(data, **{"prune_at": 3, "keep": 2, "num_points": 2, **others})


def check_pruned(run: Any, callback: FanLoraCallback) -> None:
    assert callback.setting is not None
    left = {name for name, parameter in run.model.named_parameters() if parameter.requires_grad}
    assert len(left) == 2 * len(callback.setting.kept) == 2 * 2 * 2
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(left)


def tokenized() -> Dataset:
    return rows(lambda row: {"input_ids": tokenizer()(f"{question(row)} {answer(row)}")["input_ids"]})


def conversations() -> Dataset:
    return rows(lambda row: {"messages": user(question(row)) + assistant(answer(row))})


def streamed() -> Any:
    return tokenized().to_iterable_dataset()


@pytest.mark.support("FanLoraCallback in SFT")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tokenized, {}),
        (conversations, {"assistant_only_loss": True}),
        (conversations, {"assistant_only_loss": True, "packing": True, "max_length": 24}),
        (tokenized, {"padding_free": True, "max_length": None}),
        (streamed, {}),
        (tokenized, {"label_smoothing_factor": 0.1}),
        (tokenized, {"gradient_accumulation_steps": 2, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ],
    ids=["pretokenised", "assistant only", "packed", "padding-free", "streamed", "smoothed", "reentrant"],
)
def test_sft(method: str, make: Any, options: dict[str, Any], tmp_path: Path) -> None:
    data = make()
    callback = pruning(data)
    run = SFTTrainer(
        adapted(method),
        args=SFTConfig(**arguments(tmp_path, **options)),
        train_dataset=data,
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    run.train()
    check_pruned(run, callback)
    check_saved(run, tmp_path / "saved", base())


@pytest.mark.support("FanLoraCallback in DPO")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("score", ["path", "weight_norm"])
def test_dpo(method: str, score: str, tmp_path: Path) -> None:
    callback = pruning(labelled() if score == "path" else None, method=score)
    run = dpo(method, tmp_path)
    run.add_callback(callback)
    run.train()
    check_pruned(run, callback)
    assert callback.scores.method == score
    margins = [entry["rewards/margins"] for entry in run.state.log_history if "rewards/margins" in entry]
    assert margins[-1] > margins[2] > 0  # training continues on what is left
    check_saved(run, tmp_path / "saved", base())


def with_reference(method: str, folder: Path) -> DPOTrainer:
    """A run from a trained adapter, whose start TRL keeps as the adapter "ref"."""
    if not (folder / "first").exists():
        first = dpo(method, folder / "first", max_steps=2)
        first.train()
        first.save_model(str(folder / "first"))
    trained = PeftModel.from_pretrained(base(), folder / "first", is_trainable=True)
    run = dpo(method, folder / "second", model=trained, save_strategy="steps", save_steps=4)
    run.add_callback(pruning(labelled()))
    return run


@pytest.mark.support("FanLoraCallback in DPO, trained adapter as reference")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_dpo_prunes_the_policy_and_leaves_its_reference_alone(method: str, tmp_path: Path) -> None:
    """TRL gives both adapters one configuration; pruning one must not rewrite the other's."""
    run = with_reference(method, tmp_path)
    reference = {name: value.clone() for name, value in run.model.named_parameters() if ".ref." in name}
    run.train()
    configs = run.model.peft_config
    assert configs["default"].target_modules == set(configs["default"].setting.names)
    assert len(configs["default"].target_modules) == 4
    assert len(configs["ref"].target_modules) == 14 and configs["ref"].setting is None
    for name, value in run.model.named_parameters():
        if ".ref." in name:
            assert torch.equal(value, reference.pop(name))
    assert not reference

    saved = tmp_path / "second" / "checkpoint-4"
    loaded = PeftModel.from_pretrained(base(), saved)
    loaded.load_adapter(saved / "ref", "ref")
    assert len(loaded.peft_config["default"].target_modules) == 4
    assert len(loaded.peft_config["ref"].target_modules) == 14


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="the Trainer of older transformers loads the reference alone from a checkpoint that has one",
)
@pytest.mark.support("FanLoraCallback in DPO, trained adapter as reference")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_dpo_resumes_the_pruned_policy_beside_its_reference(method: str, tmp_path: Path) -> None:
    run, again = with_reference(method, tmp_path), with_reference(method, tmp_path)
    run.train()
    again.train(resume_from_checkpoint=str(tmp_path / "second" / "checkpoint-4"))
    for name, value in again.model.named_parameters():
        torch.testing.assert_close(value, run.model.get_parameter(name), atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.support("FanLoraCallback on data without labels", refused=True)
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("trainer", ["DPOTrainer", "RewardTrainer"])
def test_data_without_labels_is_refused_before_the_first_step(method: str, trainer: str, tmp_path: Path) -> None:
    if trainer == "DPOTrainer":
        run: DPOTrainer | RewardTrainer = dpo(method, tmp_path)
        data = rows(pairs)
    else:
        model = base("LlamaForSequenceClassification", num_labels=1)
        data = rows(implicit_pairs)
        run = RewardTrainer(
            adapted(method, model, "SEQ_CLS"),
            args=RewardConfig(**arguments(tmp_path)),
            train_dataset=data,
            processing_class=tokenizer(),
        )
    run.add_callback(pruning(data))
    with pytest.raises(ValueError, match=rf"batch of {trainer} has no `labels`, only \[.*'input_ids'.*DataLoader"):
        run.train()
    assert run.state.global_step == 0


def test_empty_calibration_data_is_refused_before_the_first_step(tmp_path: Path) -> None:
    run = dpo("FanLoRA", tmp_path)
    run.add_callback(pruning(DataLoader([])))
    with pytest.raises(ValueError, match="calibration data of FanLoraCallback is empty"):
        run.train()
