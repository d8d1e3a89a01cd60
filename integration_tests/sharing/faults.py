"""Saves over an earlier state in a child process that is killed at each of its steps, and says what is left each time.

Run as a program: `python faults.py CASE FOLDER`. The model is made once; each kill is in a child of its own.
"""

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_models import TINY, adapted

import peft_fanlora
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, export_lora
from peft_fanlora.sharing import writing


STEPS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.scandir", "shutil.copyfile"}
"""The audit events of Python that a save makes; the flushes and the writing of safetensors are counted by wrappers."""


def killed_at(step: int, save: Callable[[], None]) -> int:
    """Runs a save in a child process that kills itself with SIGKILL before a step; returns its wait status."""
    if child := os.fork():
        return os.waitpid(child, 0)[1]
    left = [step]

    def count(*_: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    fsync = os.fsync
    os.fsync = lambda descriptor: (count(), fsync(descriptor))[1]
    halve_weights(count)
    sys.addaudithook(lambda event, _: count() if event in STEPS else None)
    try:
        save()
    except BaseException:
        os._exit(3)
    os._exit(0)


def halve_weights(count: Callable[[], None]) -> None:
    """Lets safetensors write the first half of a file, count a step, and write all of it."""
    import peft.peft_model

    import peft_fanlora.fanlora.export

    for module, name in ((peft.peft_model, "safe_save_file"), (peft_fanlora.fanlora.export, "save_file")):

        def save(tensors: Any, path: Any, *args: Any, _save: Any = getattr(module, name), **kwargs: Any) -> None:
            _save(tensors, path, *args, **kwargs)
            whole = Path(path).read_bytes()
            Path(path).write_bytes(whole[: len(whole) // 2])
            count()
            Path(path).write_bytes(whole)

        setattr(module, name, save)


def state(folder: Path) -> dict[str, str]:
    """Returns the digest of each file of a folder but for what a killed save was still writing."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {
        str(file): hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for file in files
        if not any(part.startswith(writing.STAGE_PREFIX) for part in file.parts)
    }


def model(method: str, seed: int, **options: Any) -> Any:
    if method == "PARA":
        from peft import get_peft_model

        torch.manual_seed(seed)
        return get_peft_model(TINY["llama"].base(), ParaConfig(task_type="CAUSAL_LM", init_para_weights=False, **options))
    made = adapted(**options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(seed if parameter.requires_grad else 0)
    return made


def setting_of(layers: int) -> FanLoraSetting:
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(layers)]
    return FanLoraSetting.from_modules(TINY["llama"].base(), names)


def scored() -> FanLoraSetting:
    made = adapted()
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
            lambda folder: export_lora(model("FanLoRA", 1), folder),
            lambda folder, made=model("FanLoRA", 2, lora_alpha=3): export_lora(made, folder),
        ),
    }


def main(case: str, folder: Path) -> None:
    """Prints, as JSON, the earlier state, the new one, and what each kill left."""
    before, after = cases()[case]()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "complete").mkdir(parents=True)
    before(folder / "complete")
    old = state(folder / "complete")
    shutil.copytree(folder / "complete", folder / "saved", dirs_exist_ok=True)
    after(folder / "saved")
    new, left, step, status = state(folder / "saved"), [], 0, 1
    while status:
        step += 1
        shutil.rmtree(folder / "saved")
        shutil.copytree(folder / "complete", folder / "saved")
        status = killed_at(step, lambda: after(folder / "saved"))
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL) and status:
            raise SystemExit(f"the save failed at step {step} with status {status}")
        left.append(state(folder / "saved"))
    print(json.dumps({"old": old, "new": new, "left": left, "package": peft_fanlora.__file__}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]))
