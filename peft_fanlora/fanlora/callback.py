"""Scoring and pruning inside a training run of transformers or TRL."""

import sys
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from .calibration import calibration_batches, check_calibration_data
from .importance import Method, find_score
from .model import FanLoraModel
from .modules import ModuleName
from .scores import ImportanceScores, Strategy
from .setting import FanLoraSetting


class FanLoraCallback(TrainerCallback, ExportableState):
    """Steps (a) to (c) of FanLoRA in one run: LoRA on all modules, and from some step on only on the best ones.

    At the end of step `prune_at` it scores the modules on a calibration set, prunes the adapter, and lets the run go
    on with what is left: the optimizer keeps its state for exactly the remaining parameters, and the schedule of the
    learning rate is not touched. The sums of the scores over each role go to the trainer's log, and all scores to
    `trainer.state.log_history`. A run resumed from a checkpoint goes on pruned if the checkpoint was. The best
    checkpoint of `load_best_model_at_end` is looked for again after pruning. One object
    may serve several runs, one after the other, and several objects one run, which then prunes in stages. That training goes on after the choice,
    in the same run, is ours; the paper fine-tunes fresh adapters on the setting [P].

    Under DistributedDataParallel each process scores its share of the calibration set, the scores are added up and all
    processes make the same choice.

    Args:
        calibration_dataset: the data to score on, in the form of the trainer's evaluation data: for an `SFTTrainer`
            also as text, messages, or prompts and completions. A few hundred rows will do. Trainers whose batches have
            no labels, such as those for preferences, need a `DataLoader`, unshuffled, whose batches have some. None
            will do for "weight_norm".
        prune_at: when to prune: a fraction of all steps (above 0, up to 1), or a number of steps (from 1).
        keep: how many modules per layer (or roles, or modules, as `strategy` says) to keep, see
            `ImportanceScores.select`.
        strategy: what is ranked against what, see `ImportanceScores.select`.
        packed: whether projections that engines pack into one matrix stay or go together.
        method: the score, see `FanLoraModel.score_modules`.
        num_points: the number of points that "path" integrates over.
        trainer: the trainer that runs the callback, as TRL's callbacks take it: make the trainer, then the callback, and
            call `trainer.add_callback(callback)`. Without it, the callback looks for the trainer among its callers.

    Attributes:
        scores: the scores, after pruning; None before, and after resuming from a pruned checkpoint.
        setting: the modules that stayed; None before pruning.

    Raises:
        ValueError: `prune_at` or `method` is not valid; or, when training begins: the model is not a FanLoRA model or
            has several active adapters, the calibration data is missing or has no labels, or the run uses FSDP, tensor
            parallelism or DeepSpeed.

    Examples:
        >>> callback = FanLoraCallback(calibration_dataset, prune_at=0.5, keep=2)
        >>> SFTTrainer(model, train_dataset=instructions, callbacks=[callback]).train()
        >>> callback.setting.save_pretrained("my-setting")
    """

    def __init__(
        self,
        calibration_dataset: Any,
        *,
        keep: int = 2,
        prune_at: float | int = 0.5,
        strategy: Strategy = "layer",
        packed: bool = False,
        method: Method = "path",
        num_points: int = 8,
        trainer: Trainer | None = None,
    ) -> None:
        is_fraction = isinstance(prune_at, float) and 0 < prune_at <= 1
        is_step = isinstance(prune_at, int) and not isinstance(prune_at, bool) and prune_at >= 1
        if not (is_fraction or is_step):
            raise ValueError(
                f"prune_at={prune_at!r} says no point of the run; pass a fraction of the steps above 0 and up to 1.0 "
                "(float), or a step from 1 (int)."
            )
        self.score = find_score(method)
        self.calibration_dataset = calibration_dataset
        self.prune_at = prune_at
        self.selection: dict[str, Any] = {"keep": keep, "strategy": strategy, "packed": packed}
        self.method = method
        self.num_points = num_points
        self.trainer = trainer
        self.scores: ImportanceScores | None = None
        self.setting: FanLoraSetting | None = None

    def state(self) -> dict[str, Any]:
        """What the trainer writes into a checkpoint: the arguments but for the data, and the setting once found."""
        return {
            "args": {
                "calibration_dataset": None,
                "prune_at": self.prune_at,
                "method": self.score.name,  # checkpoints are JSON, where a function cannot stand
                "num_points": self.num_points,
                **self.selection,
            },
            "attributes": {"saved_setting": None if self.setting is None else self.setting.to_dict()},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run can be pruned, and takes over the setting of a resumed one."""
        tuner, adapter_name = _fanlora_adapter(kwargs["model"])
        trainer = self._running_trainer(state)
        is_sharded = any(hasattr(parameter, "device_mesh") for parameter in kwargs["model"].parameters())
        if is_sharded or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "FanLoraCallback cannot prune under FSDP, tensor parallelism or DeepSpeed, which hold on to the "
                "parameters that they were set up with. Train in two runs: save the adapter of the first, load it in a "
                "single process, call score_modules and prune_modules, save it again, and begin the second run from "
                "that. DistributedDataParallel needs no such detour."
            )
        config = tuner.peft_config[adapter_name]
        if config.setting is None or config.setting is not self.setting:
            self.scores = None  # those of another run
        self.setting, saved = None, self._saved_states(trainer, state)
        if config.setting is None:
            if self.score.needs_data:
                check_calibration_data(self.calibration_dataset, trainer)
        elif not saved:
            self.setting = config.setting
        elif not any(_setting_of(each) for each in saved):
            raise ValueError(
                f"The checkpoint of step {state.global_step} was saved before pruning, but the adapter has been pruned "
                "since and cannot take the removed modules back. Make the model and the trainer again, and resume then."
            )
        else:
            own = [each for each in saved if each["args"] == self.state()["args"]]
            self.setting = _setting_of(own[-1]) if own else None
            if self.setting is not None and self.setting.kept.keys() == config.setting.kept.keys():
                config.setting = self.setting  # has the scores, which the loaded weights do not tell

    def _saved_states(self, trainer: Trainer, state: TrainerState) -> list[dict[str, Any]]:
        """Returns the states of such callbacks in the checkpoint that the run goes on from, the latest ones last.

        The trainer has a list of states for several callbacks of a class, which each checkpoint adds to, and fails on a
        class that the checkpoint does not know: the entry is put into the form that it needs.
        """
        entries: Any = state.stateful_callbacks
        name, is_alone = (
            type(self).__name__,
            sum(type(self) is type(c) for c in trainer.callback_handler.callbacks) == 1,
        )
        saved = entries.get(name, []) if state.global_step else []
        saved = saved if isinstance(saved, list) else [saved]
        entries[name] = self.state() if is_alone else saved
        # Arguments may have changed on the way, which does not matter where there is no other callback.
        return [{**each, "args": self.state()["args"]} for each in saved] if is_alone else saved

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scores and prunes once the step of `prune_at` is reached."""
        if self.setting is None and state.global_step >= self._prune_step(state):
            self._prune(self._running_trainer(state), kwargs["model"], kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns if the run ended with all modules."""
        if self.setting is None:
            warnings.warn(
                f"Training ended at step {state.global_step} without pruning, which prune_at={self.prune_at!r} puts at "
                f"step {self._prune_step(state)}: the adapter still has all its modules. Lower `prune_at`, or call "
                "score_modules and prune_modules now.",
                stacklevel=2,
            )

    def _running_trainer(self, state: TrainerState) -> Trainer:
        """Returns the trainer whose event is being handled: it alone knows how to tokenise, collate and log."""
        if self.trainer is None:
            return _calling_trainer(self)
        if self.trainer.state is not state:
            raise ValueError(
                "FanLoraCallback runs in another trainer than the one it was given: pass trainer= the one that it is added "
                "to, or set `callback.trainer` before the next run."
            )
        return self.trainer

    def _prune_step(self, state: TrainerState) -> int:
        if isinstance(self.prune_at, float):
            return max(1, round(self.prune_at * state.max_steps))
        return self.prune_at

    def _prune(self, trainer: Trainer, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        tuner, adapter_name = _fanlora_adapter(model)
        data = self.calibration_dataset
        scores = tuner.score_modules(
            None if data is None else calibration_batches(data, trainer),
            self.method,
            num_points=self.num_points,
            adapter_name=adapter_name,
            progress=not trainer.args.disable_tqdm and trainer.is_world_process_zero(),
        )
        self.setting = tuner.prune_modules(scores.select(**self.selection), adapter_name=adapter_name)
        self.scores = scores
        _forget_removed_parameters(optimizer, model)
        _wrap_again(trainer)
        trainer.state.best_metric = trainer.state.best_model_checkpoint = trainer.state.best_global_step = None
        _log(trainer, scores, self.setting)


def _setting_of(state: dict[str, Any]) -> FanLoraSetting | None:
    """Returns the setting that a callback's state in a checkpoint has, None if it was saved before pruning."""
    saved = state["attributes"]["saved_setting"]
    return None if saved is None else FanLoraSetting.from_dict(saved)


def _fanlora_adapter(model: torch.nn.Module) -> tuple[FanLoraModel, str]:
    """Returns the tuner of a trainer's model and the name of the adapter that is being trained."""
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, FanLoraModel):
        raise ValueError(
            f"FanLoraCallback trains a FanLoRA adapter, but the trainer's model is a {type(model).__name__} without "
            "one. Pass get_peft_model(base, FanLoraConfig(...)), or peft_config=FanLoraConfig(...) to a TRL trainer."
        )
    if len(tuner.active_adapters) != 1:
        raise ValueError(
            f"FanLoraCallback prunes one adapter, but {tuner.active_adapters} are active; call `set_adapter` with one."
        )
    return tuner, tuner.active_adapters[0]


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """Returns the trainer whose event a callback is handling where it was not given: the nearest caller that has it.

    Events carry the model, the optimizer and more, but not the trainer.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError("FanLoraCallback works inside a transformers.Trainer (or one of TRL's) that it was passed to.")


def _log(trainer: Trainer, scores: ImportanceScores, setting: FanLoraSetting) -> None:
    """Reports what each role adds up to as metrics, and keeps all scores in the log's history."""
    by_role: dict[str, float] = {}
    for name, score in scores.items():
        role = ModuleName.parse(name).role
        by_role[role] = by_role.get(role, 0.0) + score
    counts = {"fanlora/modules_scored": float(len(scores)), "fanlora/modules_kept": float(len(setting.kept))}
    should_log = trainer.control.should_log  # of this step, which logging would take for done
    # TRL's own `log` would add its running metrics to these and start them again.
    Trainer.log(trainer, counts | {f"fanlora/{scores.method}/{role}": score for role, score in by_role.items()})
    trainer.control.should_log = should_log
    history: list[Any] = trainer.state.log_history
    history.append({"step": trainer.state.global_step, "fanlora_scores": dict(scores)})


def _forget_removed_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Takes parameters that are no longer in the model out of an optimizer, and leaves all else in it as it is."""
    remaining = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in remaining]
    for parameter in optimizer.state.keys() - remaining:
        del optimizer.state[parameter]


def _wrap_again(trainer: Trainer) -> None:
    """Sets DistributedDataParallel up again for the parameters that are left.

    It collects gradients into buckets that it laid out for the parameters it began with, and would wait for the removed
    ones. The training loop holds the wrapper itself, so the wrapper is constructed again in its place.
    """
    wrappers = [module for module in trainer.model_wrapped.modules() if isinstance(module, DistributedDataParallel)]
    for wrapper in wrappers:
        handler: Any = trainer.accelerator.ddp_handler
        devices: Any = {"device_ids": wrapper.device_ids, "output_device": wrapper.output_device}
        DistributedDataParallel.__init__(wrapper, wrapper.module, **devices, **handler.to_kwargs())
        handler.register_comm_hook(wrapper)
