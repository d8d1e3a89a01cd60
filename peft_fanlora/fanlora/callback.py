"""A callback that scores and prunes modules during a training run of transformers or TRL."""

import json
import sys
import warnings
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..serving.sharding import is_sharded
from .arguments import check_count
from .calibration import calibration_batches, check_calibration_data
from .choices import Strategy
from .importance import Method, find_score
from .model import FanLoraModel
from .modules import ModuleName
from .scores import ImportanceScores
from .scoring import check_selection
from .setting import FanLoraSetting


class FanLoraCallback(TrainerCallback, ExportableState):
    """Runs steps (a) to (c) of FanLoRA in one training run: trains LoRA on all modules, then prunes to the best ones.

    At the end of step `prune_at` it scores the modules on a calibration set and prunes the adapter. Training continues
    with the remaining parameters, whose optimizer state and learning rate schedule are unchanged. The sum of the
    scores of each role is logged by the trainer, and all scores are added to `trainer.state.log_history`. A run
    resumed from a checkpoint is pruned if the checkpoint was. The best checkpoint for `load_best_model_at_end` is only
    chosen from those after pruning. A callback may be used in several runs, one after the other, and a run may have
    several callbacks, which prune it in stages. Continuing the same run after pruning is ours; the paper fine-tunes
    new adapters on the setting [P].

    With DistributedDataParallel each process scores its part of the calibration set. The scores are summed, and all
    processes prune the same modules.

    Args:
        calibration_dataset: the data to score on, in the format of the trainer's evaluation data: for an `SFTTrainer`
            also as text, messages, or prompts and completions. A few hundred rows are enough. Trainers whose batches
            have no labels, such as preference trainers, need an unshuffled `DataLoader` whose batches have `labels`.
            May be None for "weight_norm".
        prune_at: when to prune: a fraction of all steps (above 0, up to 1), or a number of steps (from 1).
        keep: how many modules per layer (or roles, or modules, depending on `strategy`) to keep, see
            `ImportanceScores.select`.
        strategy: which modules are ranked against each other, see `ImportanceScores.select`.
        packed: whether projections that engines pack into one matrix are kept or pruned together.
        method: the score, see `FanLoraModel.score_modules`.
        num_points: the number of points of the "path" integral.
        trainer: the trainer that runs the callback, as for TRL's callbacks: create the trainer, then the callback, and
            call `trainer.add_callback(callback)`. Without it, the callback looks for the trainer among its callers.

    Attributes:
        scores: the scores, after pruning; None before, and after resuming from a pruned checkpoint.
        setting: the modules that were kept; None before pruning.

    Raises:
        ValueError: `prune_at`, `method` or `num_points` is not valid; or, when training begins: the model is not a
            FanLoRA model or has several active adapters, `keep` modules cannot be selected from its modules, the
            calibration data is missing or has no labels, or the run uses FSDP, tensor parallelism or DeepSpeed.

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
                f"prune_at={prune_at!r} is not a step of the run: pass a fraction of the steps above 0 and up to 1.0 "
                "(float), or a step from 1 (int)."
            )
        check_count("num_points", num_points)
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
        """Returns the state to store in a checkpoint: the arguments except the data, and the setting if found."""
        return {
            "args": {
                "calibration_dataset": None,
                "prune_at": self.prune_at,
                "method": self.score.name,  # checkpoints are JSON, which cannot store a function
                "num_points": self.num_points,
                **self.selection,
            },
            # As text, because the trainer sorts the keys of a checkpoint's state, and the order of modules is the model's.
            "attributes": {"saved_setting": None if self.setting is None else json.dumps(self.setting.to_dict())},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks that the run can be pruned, and restores the setting of a resumed run."""
        tuner, adapter_name = _fanlora_adapter(kwargs["model"])
        trainer = self._running_trainer(state)
        if is_sharded(kwargs["model"].parameters()) or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "FanLoraCallback cannot prune under FSDP, tensor parallelism or DeepSpeed, which do not allow "
                "parameters to be removed. Train in two runs: save the adapter of the first, load it in a single "
                "process, call score_modules and prune_modules, save it again, and start the second run from it. "
                "DistributedDataParallel is supported."
            )
        config = tuner.peft_config[adapter_name]
        if config.setting is None or config.setting is not self.setting:
            self.scores = None  # they belong to another run
        self.setting, saved = None, self._saved_states(trainer, state)
        if config.setting is None:
            check_selection(tuner, adapter_name, **self.selection)
            if self.score.needs_data:
                check_calibration_data(self.calibration_dataset, trainer)
        elif not saved:
            self.setting = config.setting
        elif not any(_setting_of(each) for each in saved):
            raise ValueError(
                f"The checkpoint of step {state.global_step} was saved before pruning, but the adapter has been "
                "pruned since, and removed modules cannot be restored. Create the model and the trainer again, then "
                "resume."
            )
        else:
            own = [each for each in saved if each["args"] == self.state()["args"]]
            self.setting = _setting_of(own[-1]) if own else None
            if self.setting is not None and self.setting.kept.keys() == config.setting.kept.keys():
                config.setting = self.setting  # includes the scores, which the loaded adapter does not have

    def _saved_states(self, trainer: Trainer, state: TrainerState) -> list[dict[str, Any]]:
        """Returns the states of callbacks of this class in the resumed checkpoint, the latest last.

        With several callbacks of a class, the trainer stores a list of states, to which each checkpoint adds, and
        fails on a class that the checkpoint does not contain: the entry is converted to the format that it needs.
        """
        entries: Any = state.stateful_callbacks
        name, is_alone = (
            type(self).__name__,
            sum(type(self) is type(c) for c in trainer.callback_handler.callbacks) == 1,
        )
        saved = entries.get(name, []) if state.global_step else []
        saved = saved if isinstance(saved, list) else [saved]
        entries[name] = self.state() if is_alone else saved
        # A single callback may resume with changed arguments.
        return [{**each, "args": self.state()["args"]} for each in saved] if is_alone else saved

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Scores and prunes at step `prune_at`."""
        if self.setting is None and state.global_step >= self._prune_step(state):
            self._prune(self._running_trainer(state), kwargs["model"], kwargs["optimizer"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Warns if the run ended without pruning."""
        if self.setting is None:
            warnings.warn(
                f"Training ended at step {state.global_step} without pruning, which prune_at={self.prune_at!r} puts "
                f"at step {self._prune_step(state)}: the adapter still has all its modules. Lower `prune_at`, or call "
                "score_modules and prune_modules now.",
                stacklevel=2,
            )

    def _running_trainer(self, state: TrainerState) -> Trainer:
        """Returns the trainer whose event is being handled, which is needed to tokenise, collate and log."""
        if self.trainer is None:
            return _calling_trainer(self)
        if self.trainer.state is not state:
            raise ValueError(
                "FanLoraCallback runs in a different trainer than the one it was given: pass the trainer that it is "
                "added to as `trainer`, or set `callback.trainer` before the next run."
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
    """Returns the setting in a callback's saved state; None if it was saved before pruning."""
    saved = state["attributes"]["saved_setting"]
    return None if saved is None else FanLoraSetting.from_dict(json.loads(saved))


def _fanlora_adapter(model: torch.nn.Module) -> tuple[FanLoraModel, str]:
    """Returns the tuner of a trainer's model and the name of the adapter that is trained."""
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
    """Returns the trainer whose event a callback is handling: the nearest caller that has the callback.

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
    """Logs the sum of the scores of each role as metrics, and stores all scores in the log history."""
    by_role: dict[str, float] = {}
    for name, score in scores.items():
        role = ModuleName.parse(name).role
        by_role[role] = by_role.get(role, 0.0) + score
    counts = {"fanlora/modules_scored": float(len(scores)), "fanlora/modules_kept": float(len(setting.kept))}
    should_log = trainer.control.should_log  # restored below, since logging resets it
    # TRL's own `log` would add its running metrics and reset them.
    Trainer.log(trainer, counts | {f"fanlora/{scores.method}/{role}": score for role, score in by_role.items()})
    trainer.control.should_log = should_log
    history: list[Any] = trainer.state.log_history
    history.append({"step": trainer.state.global_step, "fanlora_scores": dict(scores)})


def _forget_removed_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Removes parameters that are no longer in the model from an optimizer, and leaves the rest unchanged."""
    remaining = set(model.parameters())
    for group in optimizer.param_groups:
        group["params"] = [parameter for parameter in group["params"] if parameter in remaining]
    for parameter in optimizer.state.keys() - remaining:
        del optimizer.state[parameter]


def _wrap_again(trainer: Trainer) -> None:
    """Initialises DistributedDataParallel again for the remaining parameters.

    Its gradient buckets include the removed parameters and would wait for them. The training loop holds a reference to
    the wrapper, so it is initialised again in place.
    """
    wrappers = [module for module in trainer.model_wrapped.modules() if isinstance(module, DistributedDataParallel)]
    for wrapper in wrappers:
        handler: Any = trainer.accelerator.ddp_handler
        devices: Any = {"device_ids": wrapper.device_ids, "output_device": wrapper.output_device}
        DistributedDataParallel.__init__(wrapper, wrapper.module, **devices, **handler.to_kwargs())
        handler.register_comm_hook(wrapper)
