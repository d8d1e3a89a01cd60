"""Kills whole runs at every stage, from scoring to exporting, and goes on from what they leave.

Each run is in a child process of its own. One run records what the folder holds before each of its stages, which is what
a kill at that stage leaves; others are killed there and leave the same.
"""

import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

from integration_tests.helpers.kills import alone, in_child, in_halves, killing, state
from integration_tests.helpers.models import TINY, fanlora
from integration_tests.helpers.processes import variables_of_two
from integration_tests.sharing import faults
from peft_fanlora import FanLoraCallback, FanLoraConfig, export_lora


ROWS = [{"input_ids": row, "labels": row} for row in TINY["llama"].batch(rows=12, tokens=8)["input_ids"]]
WRITES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir"}
STATE = "trainer_state.json"


def trained(folder: Path, resume: bool) -> None:
    """Trains with pruning on the way, with checkpoints before and after it, and saves the adapter."""
    torch.manual_seed(0)
    arguments = {"max_steps": 6, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    trainer = Trainer(
        get_peft_model(TINY["llama"].base(), FanLoraConfig(r=2, lora_dropout=0.1, task_type="CAUSAL_LM")),
        TrainingArguments(str(folder), **arguments, use_cpu=True, report_to="none", disable_tqdm=True),
        train_dataset=ROWS,
        callbacks=[FanLoraCallback(ROWS[:4], prune_at=3, keep=2, num_points=2)],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(folder / "final"))


def by_hand(folder: Path, resume: bool) -> None:
    """Scores, prunes, saves and exports; a restart begins again."""
    model = fanlora()
    scores = model.score_modules([TINY["llama"].batch()], num_points=2, progress=False)
    setting = model.prune_modules(scores.select(keep=2))
    model.save_pretrained(folder / "final" / "adapter")
    setting.save_pretrained(folder / "final" / "setting")
    export_lora(model, folder / "final" / "plain")


RUNS: dict[str, Callable[[Path, bool], None]] = {"a run of the trainer": trained, "by hand": by_hand}


def before_each_stage(act: Callable[[str], None], folder: Path, run: Callable[[], None]) -> None:
    """Runs `run`, and `act` with the name of the stage before each of its stages. It changes Python for good."""
    step = alone(act)

    def note(stage: str) -> Callable[..., None]:
        return lambda *_: step(stage)

    def forward(module: Any, _: Any) -> None:
        if isinstance(module, LlamaForCausalLM):
            step("forward in training" if torch.is_grad_enabled() and module.training else "forward in scoring")

    def file(event: str, arguments: Any) -> None:
        if event in WRITES and str(folder) in str(arguments[0]):
            step("file")

    delete, save, to_json = LoraLayer.delete_adapter, torch.save, TrainerState.save_to_json

    def delete_adapter(*arguments: Any) -> None:
        step("pruning")
        delete(*arguments)

    register_module_forward_pre_hook(forward)
    register_optimizer_step_pre_hook(note("before the optimizer"))
    register_optimizer_step_post_hook(note("after the optimizer"))
    LoraLayer.delete_adapter = delete_adapter  # type: ignore[method-assign]
    faults.halve_weights(note("half of the weights"))
    torch.save = functools.partial(in_halves, save, note("half of a checkpoint's state"))
    TrainerState.save_to_json = lambda *arguments: in_halves(  # type: ignore[method-assign]
        to_json, note("half of a checkpoint's state"), *arguments
    )
    sys.addaudithook(file)
    run()


def recorded(folder: Path, snapshots: Path, run: Callable[[], None]) -> list[list[str]]:
    """Runs to the end. Returns the stages, each with the name of the snapshot of what the folder holds before it."""
    found: list[list[str]] = []
    names: dict[str, str] = {}

    def keep(stage: str) -> None:
        digest = json.dumps(state(folder), sort_keys=True)
        if digest not in names:
            names[digest] = f"{len(names):03}"
            shutil.copytree(folder, snapshots / names[digest])
        found.append([stage, names[digest]])

    before_each_stage(keep, folder, run)
    return found


def remove_incomplete_checkpoints(folder: Path) -> int:
    """Removes checkpoints whose state, which the trainer writes last, is missing or half. Returns how many."""
    removed = 0
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / STATE).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            shutil.rmtree(checkpoint)
            removed += 1
    return removed


def restarted(name: str, folder: Path) -> dict[str, Any]:
    """Goes on from what a killed run has left. Returns the error where that is refused, else the final files."""
    try:
        RUNS[name](folder, any(folder.glob("checkpoint-*")))
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)[:200]}
    return {"final": state(folder / "final")}


def chosen(stages: list[list[str]]) -> list[int]:
    """Returns the numbers of the stages to kill at: the last of each kind, and every hundredth."""
    last = {stage: number for number, (stage, _) in enumerate(stages)}
    return sorted({*last.values(), *range(0, len(stages), 100)})


def kills(name: str, folder: Path) -> dict[str, Any]:
    """Kills a run at its stages and restarts it, as the report of the tests says."""
    run, snapshots, place = RUNS[name], folder / "snapshots", folder / "run"

    def fresh(source: Path | None = None) -> Path:
        shutil.rmtree(place, ignore_errors=True)
        if source is None:
            place.mkdir(parents=True)
        else:
            shutil.copytree(source, place)
        return place

    def result(act: Callable[[], Any]) -> Any:
        status, found = in_child(act)
        if status:
            raise SystemExit(f"{name}: a run ended with status {status}")
        return json.loads(found)

    fresh()
    stages = result(lambda: recorded(place, snapshots, lambda: run(place, False)))
    expected = state(place / "final")
    restarts: dict[str, Any] = {}
    for number in chosen(stages):
        stage, snapshot = stages[number]
        fresh()
        kill = killing(number + 1)
        status, _ = in_child(lambda kill=kill: before_each_stage(lambda _: kill(), place, lambda: run(place, False)))
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit(f"{name}: the run was not killed at {stage} {number}, its status is {status}")
        if state(place).keys() != state(snapshots / snapshot).keys():
            raise SystemExit(f"{name}: a kill at {stage} {number} left other files than there were before the stage")
        remove_incomplete_checkpoints(place)
        left = json.dumps(sorted(state(place)))
        if left not in restarts:
            restarts[left] = result(lambda: restarted(name, place))

    def as_left() -> list[dict[str, Any]]:
        found = []
        for snapshot in sorted(snapshots.iterdir())[::4]:
            incomplete = remove_incomplete_checkpoints(fresh(snapshot))
            if incomplete:
                found.append(restarted(name, fresh(snapshot)))
        return found

    return {
        "stages": Counter(stage for stage, _ in stages),
        "states": len(list(snapshots.iterdir())),
        "killed": len(chosen(stages)),
        "expected": expected,
        "restarts": list(restarts.values()),
        "incomplete": result(as_left),
    }


def in_two(folder: Path, resume: bool = False, kill_at: int = 0) -> list[Any]:
    """Trains in two processes with DistributedDataParallel.

    Args:
        folder: the folder of the run.
        resume: whether to go on from the last checkpoint.
        kill_at: at which optimizer step the second process kills itself with SIGKILL; 0 for none.

    Returns:
        The error of the first process, "" for none, and the wait status of the second.
    """
    first, second = variables_of_two()

    def both() -> tuple[str, int]:
        other = os.fork()
        os.environ.update(first if other else second)
        if other == 0:
            kill = killing(kill_at)
            register_optimizer_step_pre_hook(lambda *_: kill())
            trained(folder, resume)
            os._exit(0)
        error = ""
        try:
            trained(folder, resume)
        except RuntimeError as lost:  # of gloo
            error = str(lost)
        return error, os.waitpid(other, 0)[1]

    status, found = in_child(both)
    if status:
        raise SystemExit(f"the first of two processes ended with status {status}")
    return json.loads(found)


def lost(folder: Path) -> dict[str, Any]:
    """Loses one of two processes in the middle of a run, after its second checkpoint, and goes on from that."""
    warnings.simplefilter("ignore")
    place = folder / "run"
    ends = {"whole": in_two(place)}
    expected = state(place)
    shutil.rmtree(place)
    ends["lost"] = in_two(place, kill_at=5)
    left = state(place)
    ends["resumed"] = in_two(place, resume=True)
    return {"ends": ends, "expected": expected, "left": left, "resumed": state(place)}


def import_what_runs_import(folder: Path) -> None:
    """Imports what a run imports while it runs, so that not each child has to."""

    def newly_imported() -> list[str]:
        before = set(sys.modules)
        for number, run in enumerate(RUNS.values()):
            run(folder / f"imports-{number}", False)
        return [name for name in sys.modules if name not in before]

    for name in json.loads(in_child(newly_imported)[1]):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def report(folder: Path) -> dict[str, Any]:
    """Returns what kills do to each kind of run. This process must not have computed gradients before."""
    warnings.simplefilter("ignore")
    with mock.patch.dict(sys.modules, {"matplotlib": None}):  # whose pictures take most of the time
        import_what_runs_import(folder)
        return {name: kills(name, folder / str(number)) for number, name in enumerate(RUNS)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(report(Path(sys.argv[1]))))
