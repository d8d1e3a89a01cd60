"""FanLoraCallback: the whole method in one run of transformers' or TRL's trainer."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainerState, TrainingArguments
from trl import SFTConfig, SFTTrainer

from integration_tests.helpers.models import TINY, fanlora, logits
from integration_tests.helpers.text import sentences, tokenizer
from peft_fanlora import FanLoraCallback, FanLoraConfig, FanLoraSetting


pytestmark = pytest.mark.slow

TEXT = Dataset.from_dict({"text": sentences(64)})
CALIBRATION = TEXT.select(range(8))


def fresh(**config: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(TINY["llama"].base(), FanLoraConfig(r=4, task_type="CAUSAL_LM", **config))


def sft(
    folder: Path,
    *callbacks: FanLoraCallback,
    model: PeftModel | None = None,
    data: Dataset = TEXT,
    **arguments: Any,
) -> SFTTrainer:
    """TRL's trainer with its default arguments but for the size of the run; the callback gets raw text."""
    arguments = {"max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 1e-2, **arguments}
    return SFTTrainer(
        fresh() if model is None else model,
        args=SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True, **arguments),
        train_dataset=data,
        eval_dataset=data.select(range(3)),
        processing_class=tokenizer(),
        callbacks=list(callbacks),
    )


def trained_parameters(trainer: Trainer) -> set[str]:
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert len(held) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    return {name for name, parameter in trainer.model.named_parameters() if id(parameter) in held}


@pytest.mark.support("scoring and pruning within a training run")
def test_the_whole_method_in_one_run_with_trls_defaults(tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=0.5, keep=2)
    trainer = sft(tmp_path, callback, logging_steps=1)
    assert trainer.args.gradient_checkpointing
    untouched = {name: value.clone() for name, value in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()

    assert len(callback.scores) == 21
    assert len(callback.setting.kept) == 6
    assert trainer.model.peft_config["default"].target_modules == set(callback.setting.names)
    assert callback.scores.num_tokens == 8 * 8  # eight words and the end, of which the first is not predicted
    for name, parameter in trainer.model.named_parameters():
        if "lora_" not in name:
            original = untouched.get(name, untouched.get(name.replace("_proj.", "_proj.base_layer.")))
            assert torch.equal(parameter, original)

    # exactly what is left is trained
    expected = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained_parameters(trainer) == expected
    assert len(expected) == 2 * 6
    assert set(trainer.optimizer.state) <= set(trainer.model.parameters())
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {8}  # the moments were kept, not restarted

    # the schedule of the learning rate is the one of a run without pruning
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert rates == pytest.approx([1e-2 * (1 - step / 8) for step in range(8)], rel=1e-4)

    # the scores are in the log
    logged = next(entry for entry in trainer.state.log_history if "fanlora/modules_kept" in entry)
    assert (logged["step"], logged["fanlora/modules_kept"], logged["fanlora/modules_scored"]) == (4, 6, 21)
    role = sum(score for name, score in callback.scores.items() if name.endswith("mlp.up_proj"))
    assert logged["fanlora/path/mlp.up_proj"] == pytest.approx(role)
    assert {"step": 4, "fanlora_scores": dict(callback.scores)} in trainer.state.log_history


def test_training_continues_after_pruning(tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=2, keep=2)
    trainer = sft(tmp_path, callback, max_steps=30)
    before = trainer.evaluate()["eval_loss"]
    at_pruning = {}

    def remember(*args: Any, **kwargs: Any) -> None:
        if callback.setting is not None and not at_pruning:
            at_pruning.update({name: value.clone() for name, value in trainer.model.state_dict().items()})

    class Remember(TrainerCallback):
        on_step_end = remember

    trainer.add_callback(Remember())
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, at_pruning[name])}
    assert changed == trained_parameters(trainer)
    assert trainer.evaluate()["eval_loss"] < before - 0.03


@pytest.mark.support("scoring and pruning within a training run")
def test_a_plain_trainer_with_tokenised_rows(tmp_path: Path) -> None:
    words = tokenizer()
    rows = [words(text) for text in sentences(32)]
    callback = FanLoraCallback(rows[:4], prune_at=0.5, strategy="role", keep=2, method="output_norm")
    trainer = Trainer(
        fresh(),
        TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True),
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        train_dataset=rows,
        callbacks=[callback],
    )
    trainer.train()
    assert len(callback.setting.roles) == 2
    assert callback.scores.method == "output_norm"


@pytest.mark.parametrize("data", ["prompt-completion", "messages"])
def test_calibration_data_in_trls_forms(data: str, tmp_path: Path) -> None:
    question, answer = "w1 w2", "w3 w4 w5"
    if data == "messages":
        turn = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        row: dict[str, Any] = {"messages": turn}
        tokens = 5 + 6 - 1  # all but the very first, which nothing predicts
    else:
        row, tokens = {"prompt": question, "completion": " " + answer}, 3 + 1  # the completion and its end
    data = Dataset.from_list([row] * 8)
    callback = FanLoraCallback(data.select(range(3)), prune_at=1, keep=1)
    sft(tmp_path, callback, data=data, max_steps=2).train()
    assert callback.scores.num_tokens == 3 * tokens


@pytest.mark.parametrize("accumulation", [1, 3])
def test_steps_count_optimizer_steps(accumulation: int, tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=2, keep=2)
    trainer = sft(tmp_path, callback, max_steps=4, gradient_accumulation_steps=accumulation)
    trainer.train()
    assert next(entry for entry in trainer.state.log_history if "fanlora_scores" in entry)["step"] == 2


@pytest.mark.support("gradient checkpointing")
def test_without_gradient_checkpointing_the_run_is_the_same(tmp_path: Path) -> None:
    settings, weights = [], []
    for checkpointing in (True, False):
        callback = FanLoraCallback(CALIBRATION, prune_at=0.5, keep=2)
        trainer = sft(tmp_path, callback, gradient_checkpointing=checkpointing)
        trainer.train()
        settings.append(callback.setting.names)
        weights.append({name: value for name, value in trainer.model.state_dict().items() if "lora_" in name})
    assert settings[0] == settings[1]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-4)


def test_scoring_does_not_disturb_the_run(tmp_path: Path) -> None:
    """Data order, dropout and the optimizer up to the prune are those of a run without the callback."""
    histories = []
    for prune_at in (5, 100):
        callback = FanLoraCallback(CALIBRATION, prune_at=prune_at, keep=2)
        trainer = sft(tmp_path, callback, model=fresh(lora_dropout=0.1), max_steps=6, logging_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        histories.append(([entry["loss"] for entry in entries[:5]], trainer.state.num_input_tokens_seen))
    assert histories[0] == histories[1]


@pytest.mark.support("resuming a run that prunes")
@pytest.mark.parametrize("resume_at", [2, 4])
def test_resuming_before_and_after_the_prune(resume_at: int, tmp_path: Path) -> None:
    def callback() -> FanLoraCallback:
        return FanLoraCallback(CALIBRATION, prune_at=3, keep=2)

    whole, part = callback(), callback()
    arguments = {"save_steps": 2, "logging_steps": 1, "max_steps": 6}
    first = sft(tmp_path, whole, **arguments)
    first.train()
    second = sft(tmp_path, part, **arguments)
    second.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{resume_at}"))
    assert part.setting == whole.setting
    assert second.model.peft_config["default"].setting == whole.setting
    assert trained_parameters(second) == trained_parameters(first)
    expected = {name: value for name, value in first.model.state_dict().items() if "lora_" in name}
    found = {name: value for name, value in second.model.state_dict().items() if "lora_" in name}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert {int(state["step"]) for state in second.optimizer.state.values()} == {6}


def test_a_callback_used_again_prunes_each_run(tmp_path: Path) -> None:
    """It once kept the first run's setting, and no later run pruned."""
    callback = FanLoraCallback(CALIBRATION, prune_at=2, keep=2)
    settings, scores = [], []
    for seed in range(2):
        trainer = sft(tmp_path / str(seed), callback, max_steps=3, seed=seed, learning_rate=0.1, save_steps=1)
        trainer.train()
        assert len(trained_parameters(trainer)) == 2 * 6
        assert trainer.model.peft_config["default"].setting is callback.setting
        settings.append(callback.setting)
        scores.append(callback.scores)
    assert settings[0] != settings[1] and scores[0] is not scores[1]
    with pytest.warns(UserWarning, match="ended at step 1 without pruning"):
        sft(tmp_path / "short", callback, max_steps=1).train()
    assert callback.setting is None and callback.scores is None

    # the same object, resumed before and after the prune, in the same session
    for resume_at in (1, 2):
        resumed = sft(tmp_path / "1", callback, max_steps=3, seed=1, learning_rate=0.1)
        resumed.train(resume_from_checkpoint=str(tmp_path / "1" / f"checkpoint-{resume_at}"))
        assert callback.setting == settings[1]
        assert trained_parameters(resumed) == trained_parameters(trainer)


def test_model_init_prunes_each_run(tmp_path: Path) -> None:
    words = tokenizer()
    rows = [words(text) for text in sentences(32)]
    callback = FanLoraCallback(rows[:4], prune_at=1, keep=2)
    trainer = Trainer(
        model_init=lambda: fresh(),
        args=TrainingArguments(str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True),
        data_collator=DataCollatorForLanguageModeling(words, mlm=False),
        train_dataset=rows,
        callbacks=[callback],
    )
    for _ in range(2):
        trainer.train()
        assert trainer.model.peft_config["default"].setting is callback.setting is not None
        assert len(trained_parameters(trainer)) == 2 * 6


def two_stages() -> list[FanLoraCallback]:
    return [FanLoraCallback(CALIBRATION, prune_at=step, keep=keep) for step, keep in ((2, 4), (4, 2))]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SFTTrainer, list[FanLoraCallback]]:
    """The folder, the trainer and the callbacks of a run that was not interrupted, with a checkpoint of each step."""
    folder, callbacks = tmp_path_factory.mktemp("whole-run"), two_stages()
    trainer = sft(folder, *callbacks, max_steps=6, save_steps=1)
    trainer.train()
    assert [len(callback.setting.kept) for callback in callbacks] == [12, 6]
    return folder, trainer, callbacks


@pytest.mark.support("resuming a run that prunes")
@pytest.mark.xdist_group("whole_run")
@pytest.mark.parametrize("resume_at", [1, 2, 3, 4, 5])
def test_resuming_a_run_that_prunes_in_two_stages(resume_at: int, whole_run: Any, tmp_path: Path) -> None:
    folder, first, whole = whole_run
    part = two_stages()[::-1]  # their order does not matter
    second = sft(tmp_path, *part, max_steps=6, save_steps=1)
    second.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume_at}"))
    assert [callback.setting for callback in part] == [callback.setting for callback in whole[::-1]]
    assert trained_parameters(second) == trained_parameters(first)
    found = {name: value for name, value in second.model.state_dict().items() if "lora_" in name}
    expected = {name: value for name, value in first.model.state_dict().items() if "lora_" in name}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    if resume_at == 3:  # a checkpoint of a run that was itself resumed
        third = sft(tmp_path, *two_stages(), max_steps=7)
        third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
        assert trained_parameters(third) == trained_parameters(first)


def test_a_second_stage_added_on_resuming(tmp_path: Path) -> None:
    sft(tmp_path, two_stages()[0], max_steps=3, save_steps=3).train()
    callbacks = two_stages()
    sft(tmp_path, *callbacks, max_steps=6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [len(callback.setting.kept) for callback in callbacks] == [12, 6]


@pytest.mark.parametrize("save_only_model", [False, True])
def test_training_again_with_the_same_trainer_stays_pruned(save_only_model: bool, tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=2, keep=2)
    trainer = sft(tmp_path, callback, max_steps=3, save_steps=1, save_only_model=save_only_model)
    trainer.train()
    setting, scores = callback.setting, callback.scores
    reason = "saved before pruning" if save_only_model else "doesn't match the size of optimizer's group"
    with pytest.warns(UserWarning, match="30 of the 42 tensors"), pytest.raises(ValueError, match=reason):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    trainer = sft(tmp_path, callback, model=trainer.model, max_steps=3)
    trainer.train()
    assert trainer.model.peft_config["default"].setting is callback.setting
    assert callback.setting == setting
    assert callback.scores is (None if save_only_model else scores)


def test_resuming_with_restored_callbacks(tmp_path: Path) -> None:
    arguments = {"save_steps": 2, "max_steps": 6, "restore_callback_states_from_checkpoint": True}
    callback = FanLoraCallback(CALIBRATION, prune_at=3, keep=2)
    sft(tmp_path, callback, **arguments).train()
    after = sft(tmp_path, FanLoraCallback(CALIBRATION, prune_at=3, keep=2), **arguments)
    after.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert after.model.peft_config["default"].setting == callback.setting
    before = sft(tmp_path, FanLoraCallback(CALIBRATION, prune_at=3, keep=2), **arguments)
    with pytest.raises(ValueError, match="cannot restore it"):
        before.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_callback_added_on_resuming(tmp_path: Path) -> None:
    """The trainer keeps the states of the callbacks that a checkpoint knows, and fails on one that it doesn't."""
    plain = sft(tmp_path, FanLoraCallback(CALIBRATION), save_steps=2, max_steps=2)
    plain.pop_callback(FanLoraCallback)
    plain.train()
    callback = FanLoraCallback(CALIBRATION, prune_at=1, keep=2)
    sft(tmp_path, callback, save_steps=2, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(callback.setting.kept) == 6


@pytest.mark.support("`load_best_model_at_end` in a run that prunes")
def test_checkpoints_and_evaluation_on_both_sides(tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=3, keep=2)
    arguments = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    trainer = sft(tmp_path, callback, max_steps=6, **arguments)
    trainer.train()
    assert FanLoraSetting.from_pretrained(tmp_path / "checkpoint-4") == callback.setting
    assert not (tmp_path / "checkpoint-2" / "fanlora_setting.json").exists()
    # a better checkpoint from before the prune does not fit the pruned adapter
    assert trainer.state.best_model_checkpoint in {str(tmp_path / f"checkpoint-{step}") for step in (4, 6)}
    trainer.save_model(tmp_path / "final")
    loaded = PeftModel.from_pretrained(TINY["llama"].base(), tmp_path / "final").eval()
    batch = TINY["llama"].batch()
    torch.testing.assert_close(logits(loaded, batch), logits(trainer.model.eval(), batch), rtol=0, atol=1e-6)


def test_a_run_that_ends_without_pruning_warns(tmp_path: Path) -> None:
    trainer = sft(tmp_path, FanLoraCallback(CALIBRATION, prune_at=9, keep=2), max_steps=2)
    with pytest.warns(UserWarning, match="ended at step 2 without pruning, which prune_at=9 puts at step 9"):
        trainer.train()


def test_a_prune_at_the_last_step_trains_nothing_afterwards(tmp_path: Path) -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=1.0, keep=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", module="peft|trl|transformers|torch")
        sft(tmp_path, callback, max_steps=2).train()
    assert len(callback.setting.kept) == 6


def test_starting_from_a_setting_leaves_it_alone(tmp_path: Path) -> None:
    setting = FanLoraSetting.from_modules(TINY["llama"].base(), ["model.layers.0.mlp.up_proj"])
    callback = FanLoraCallback(CALIBRATION, prune_at=1, keep=2)
    trainer = sft(tmp_path, callback, model=fresh(setting=setting), max_steps=2)
    trainer.train()
    assert callback.setting == setting
    assert callback.scores is None


@pytest.mark.parametrize("prune_at", [0, 0.0, 1.5, -1, True, "half"])
def test_prune_at_has_to_be_a_point_of_the_run(prune_at: Any) -> None:
    with pytest.raises(ValueError, match="is not a step of the run"):
        FanLoraCallback(CALIBRATION, prune_at=prune_at)


def test_what_cannot_be_scored_or_selected_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`num_points` is 0; it must be an integer of at least 1"):
        FanLoraCallback(CALIBRATION, num_points=0)
    for selection, reason in [
        ({"keep": 7}, "at least 1 and less than 7"),
        ({"keep": "2"}, "not a whole number"),
        ({"strategy": "layers"}, "strategy='layers' is unknown"),
        ({"keep": 4, "packed": True}, "at least 1 and less than 4"),
    ]:
        trainer = sft(tmp_path, FanLoraCallback(CALIBRATION, **selection))
        with pytest.raises(ValueError, match=reason):
            trainer.train()
        assert trainer.state.global_step == 0


def test_other_models_are_refused_when_training_begins(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method='magic' is unknown"):
        FanLoraCallback(CALIBRATION, method="magic")
    lora = get_peft_model(TINY["llama"].base(), LoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match="trains a FanLoRA adapter, but the trainer's model is a PeftModelForCausalLM"
    ):
        sft(tmp_path, FanLoraCallback(CALIBRATION, keep=2), model=lora).train()
    with pytest.raises(ValueError, match="no calibration data"):
        sft(tmp_path, FanLoraCallback(None, keep=2)).train()
    several = fanlora()
    several.add_adapter("other", FanLoraConfig(task_type="CAUSAL_LM"))
    several.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"\['default', 'other'\] are active"):
        sft(tmp_path, FanLoraCallback(CALIBRATION, keep=2), model=several).train()


@pytest.mark.support("FanLoraCallback under FSDP, tensor parallelism or DeepSpeed", refused=True)
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("engine", ["is_fsdp_enabled", "is_deepspeed_enabled", "sharded"])
def test_engines_that_hold_on_to_parameters_are_refused(
    method: str, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = SimpleNamespace(is_fsdp_enabled=False, is_deepspeed_enabled=False)
    model = fanlora()
    if engine == "sharded":
        next(model.parameters()).device_mesh = "as a DTensor has one"
    else:
        setattr(trainer, engine, True)
    monkeypatch.setattr("peft_fanlora.fanlora.callback._calling_trainer", lambda callback: trainer)
    callback = FanLoraCallback(CALIBRATION, keep=2)
    with pytest.raises(
        ValueError, match=r"cannot prune under FSDP, tensor parallelism or DeepSpeed.*a single process"
    ):
        callback.on_train_begin(None, None, None, model=model)


def test_outside_a_trainer_it_says_so() -> None:
    callback = FanLoraCallback(CALIBRATION, keep=2)
    with pytest.raises(RuntimeError, match=r"works inside a transformers\.Trainer"):
        callback.on_train_begin(None, None, None, model=fanlora())


def test_a_trainer_that_is_given_is_not_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("peft_fanlora.fanlora.callback._calling_trainer")
    trainer = sft(tmp_path, max_steps=2)
    callback = FanLoraCallback(CALIBRATION, prune_at=1, keep=2, trainer=trainer)
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.setting.kept) == 6
    with pytest.raises(ValueError, match="runs in a different trainer than the one it was given"):
        sft(tmp_path, callback, max_steps=1).train()


def test_without_a_trainer_an_event_outside_of_one_is_refused() -> None:
    callback = FanLoraCallback(CALIBRATION, prune_at=1, keep=2)
    with pytest.raises(RuntimeError, match="works inside a transformers"):
        callback._running_trainer(TrainerState())
