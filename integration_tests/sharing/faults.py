"""Saves over an earlier state in child processes that are killed, and reports what each step leaves.

Run as a program: `python faults.py kills-and-refusals|full-disk FOLDER`; the latter with a FOLDER on a small disk that
may be filled. Each kill and each refusal is in a child of its own.
"""

import functools
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from integration_tests.helpers.kills import alone, in_child, in_halves, killing, state
from integration_tests.helpers.models import TINY, fanlora
from integration_tests.helpers.processes import CAN_RESUME_IN_TWO
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, export_lora


STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "shutil.copyfile"}
"""The audit events of Python that a save makes; the flushes and the writing of safetensors are counted by wrappers."""


def before_each_step(act: Callable[[], None], save: Callable[[], None]) -> None:
    """Runs a save, and `act` before each of its steps. It changes Python for good, so this is for a child process."""
    step = alone(lambda *_: act())
    os.fsync = step  # flushing matters where the machine fails, not where a process is killed
    halve_weights(step)
    sys.addaudithook(lambda event, _: step() if event in STEPS else None)
    save()


def states_of(folder: Path, save: Callable[[], None]) -> list[dict[str, str]]:
    """Returns what a folder holds before each step of a save, which is what a kill at that step leaves, and at the end."""
    found: list[dict[str, str]] = []
    before_each_step(lambda: found.append(state(folder)), save)
    return [*found, state(folder)]


def halve_weights(step: Callable[[], None]) -> None:
    """Makes safetensors write the first half of a file, then a step, then all of it."""
    import peft.peft_model

    import peft_fanlora.fanlora.export

    for module, name in ((peft.peft_model, "safe_save_file"), (peft_fanlora.fanlora.export, "save_file")):
        setattr(module, name, functools.partial(in_halves, getattr(module, name), step))


def model(method: str, seed: int, **options: Any) -> Any:
    if method == "PARA":
        from peft import get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(
            TINY["llama"].base(), ParaConfig(task_type="CAUSAL_LM", init_para_weights=False, **options)
        )
    made = fanlora(**options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(seed if parameter.requires_grad else 0)
    return made


def setting_of(layers: int) -> FanLoraSetting:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(layers)]
    return FanLoraSetting.from_modules(TINY["llama"].base(), names)


def scored() -> FanLoraSetting:
    made = fanlora()
    return made.prune_modules(made.score_modules([TINY["llama"].batch()], num_points=1, progress=False).select(2))


def cases() -> dict[str, Callable[[], tuple[Callable[[Path], None], Callable[[Path], None]]]]:
    """Returns, for each case, what makes the save of the earlier state and the save of the new one."""

    def two_adapters(seed: int) -> Any:
        made = model("FanLoRA", seed)
        made.add_adapter("second", FanLoraConfig(r=1 + seed, task_type="CAUSAL_LM"))
        return made

    return {
        "setting": lambda: (setting_of(1).save_pretrained, setting_of(2).save_pretrained),
        "setting, first save": lambda: (lambda _: None, setting_of(2).save_pretrained),
        "adapter, further training": lambda: (
            model("FanLoRA", 1).save_pretrained,
            model("FanLoRA", 2).save_pretrained,
        ),
        "adapter, another setting": lambda: (
            model("FanLoRA", 1, setting=scored()).save_pretrained,
            model("FanLoRA", 2, setting=setting_of(2), lora_alpha=3).save_pretrained,
        ),
        "adapter, no longer pruned": lambda: (
            model("FanLoRA", 1, setting=setting_of(2)).save_pretrained,
            model("FanLoRA", 2).save_pretrained,
        ),
        "adapter, first save": lambda: (lambda _: None, model("FanLoRA", 2).save_pretrained),
        "two adapters": lambda: (two_adapters(1).save_pretrained, two_adapters(2).save_pretrained),
        "PARA adapter": lambda: (model("PARA", 1, r=2).save_pretrained, model("PARA", 2, r=3).save_pretrained),
        "export": lambda: (
            functools.partial(export_lora, model("FanLoRA", 1)),
            functools.partial(export_lora, model("FanLoRA", 2, lora_alpha=3)),
        ),
    }


def kills(case: str, folder: Path) -> dict[str, Any]:
    """Returns the earlier state, the new one, what a kill at each step leaves, and how many kills have confirmed that.

    One save records the state before each of its steps; others are killed at every tenth step and leave the same.
    """
    before, after = cases()[case]()
    (folder / "complete").mkdir(parents=True)
    before(folder / "complete")
    saved = folder / "saved"

    def repeated(act: Callable[[], Any]) -> tuple[int, str]:
        shutil.rmtree(saved, ignore_errors=True)
        shutil.copytree(folder / "complete", saved)
        return in_child(act)

    status, result = repeated(lambda: states_of(saved, lambda: after(saved)))
    if status:
        raise SystemExit(f"{case}: the save failed with status {status}")
    left, killed = json.loads(result), 0
    for step in range(1, len(left), 10):
        status, _ = repeated(lambda step=step: before_each_step(killing(step), lambda: after(saved)))
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            raise SystemExit(f"{case}: the save was not killed at step {step}, its status is {status}")
        if state(saved) != left[step - 1]:
            raise SystemExit(f"{case}: a kill at step {step} left another state than that before the step")
        killed += 1
    return {"old": state(folder / "complete"), "new": left[-1], "left": left, "killed": killed}


def file_in_the_place(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("mine")


def folder_in_the_way(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "fanlora_setting.json"):
        if (folder / name).exists():
            (folder / name).unlink()
            (folder / name).mkdir()


def read_only(folder: Path) -> None:
    folder.chmod(0o555)
    if os.geteuid() == 0:  # whom no permission stops; the save runs as another user
        for parent in folder.parents[:-2]:
            parent.chmod(0o755)


def full_disk(folder: Path) -> None:
    with suppress(OSError), (folder.parent / "ballast").open("wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(512))


def nothing(*_: Any) -> None:
    pass


OBSTACLES: dict[str, tuple[Callable[[Path], None], Callable[[], None]]] = {
    "a file in the place of the folder": (file_in_the_place, nothing),
    "a folder in the place of a file": (folder_in_the_way, nothing),
    "a read-only folder": (read_only, lambda: os.setuid(65534) if os.geteuid() == 0 else None),
    "files limited to 512 bytes": (nothing, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))),
    "a full disk": (full_disk, nothing),
}
"""What is done to the earlier state, and to the process that saves over it."""


def refusal(folder: Path, restrict: Callable[[], None], save: Callable[[Path], None]) -> dict[str, Any]:
    """Returns the error of a save over an earlier state in a child process, and whether it left that as it was."""
    before = listing(folder)

    def try_to_save() -> dict[str, Any]:
        try:
            restrict()
            save(folder)
        except Exception as error:
            return {"error": type(error).__name__, "message": str(error)}
        return {"error": None, "message": ""}

    return {**json.loads(in_child(try_to_save)[1]), "intact": listing(folder) == before}


def listing(folder: Path) -> dict[str, str]:
    """Returns the state of a folder with its subfolders, hidden ones too, or of the file in its place."""
    if folder.is_file():
        return {"": folder.read_text()}
    return {**state(folder), **{str(path): "" for path in folder.rglob("*") if path.is_dir()}}


def refusals(folder: Path, obstacles: Iterable[str]) -> dict[str, Any]:
    """Returns what each obstacle does to each kind of save."""
    kinds = {name: cases()[name]() for name in ("setting", "adapter, further training", "PARA adapter", "export")}
    found = {}
    for obstacle in obstacles:
        prepare, restrict = OBSTACLES[obstacle]
        for name, (before, after) in kinds.items():
            place = folder / "saved"
            place.mkdir(parents=True)
            before(place)
            prepare(place)
            found[f"{obstacle}: {name}"] = refusal(place, restrict, after)
            shutil.rmtree(folder)
    return found


def main(what: str, folder: Path) -> dict[str, Any]:
    """Returns the result of one of the two programs."""
    if what == "full-disk":
        return refusals(folder, ["a full disk"])
    from integration_tests.sharing import killed_runs

    return {
        "runs": killed_runs.report(folder / "runs"),
        "lost": killed_runs.lost(folder / "lost") if CAN_RESUME_IN_TWO else None,
        "kills": {case: kills(case, folder / str(number)) for number, case in enumerate(cases())},
        "refusals": refusals(folder / "refusals", [name for name in OBSTACLES if name != "a full disk"]),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
