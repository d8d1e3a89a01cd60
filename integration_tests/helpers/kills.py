"""Child processes that are killed at a step of theirs, and what they leave in a folder."""

import hashlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft_fanlora.sharing import writing


def in_child(act: Callable[[], Any]) -> tuple[int, str]:
    """Runs `act` in a child process. Returns its wait status, and its result as JSON if it came to its end."""
    reading, writing_end = os.pipe()
    if child := os.fork():
        os.close(writing_end)
        with os.fdopen(reading) as pipe:
            result = pipe.read()
        return os.waitpid(child, 0)[1], result
    os.close(reading)
    try:
        result = json.dumps(act())
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    with os.fdopen(writing_end, "w") as pipe:
        pipe.write(result)
    os._exit(0)


def alone(act: Callable[..., None]) -> Callable[..., None]:
    """Returns a step that runs `act`, and nothing where `act` itself takes steps."""
    is_acting = False

    def step(*arguments: Any) -> None:
        nonlocal is_acting
        if not is_acting:
            is_acting = True
            act(*arguments)
            is_acting = False

    return step


def killing(step: int) -> Callable[[], None]:
    """Returns what kills this process with SIGKILL when it is called for the `step`-th time."""
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return count


def in_halves(
    save_file: Callable[..., None], step: Callable[[], None], tensors: Any, path: Any, **options: Any
) -> None:
    save_file(tensors, path, **options)
    whole = Path(path).read_bytes()
    Path(path).write_bytes(whole[: len(whole) // 2])
    step()
    Path(path).write_bytes(whole)


def state(folder: Path) -> dict[str, str]:
    """Returns the digest of each file of a folder but for what a killed save was still writing."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {
        str(file): hashlib.sha256((folder / file).read_bytes()).hexdigest()
        for file in files
        if not any(part.startswith(writing.STAGE_PREFIX) for part in file.parts)
    }
