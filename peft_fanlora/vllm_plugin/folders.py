"""What the process that takes requests knows of an adapter's folder, read once for each state of its files."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from .tenants import CONFIG_NAME, WEIGHTS_NAME, TenantError, peft_type_of


State = tuple[tuple[int, int] | None, ...]


def state_of(folder: str) -> State:
    """Returns when the files of an adapter were written, and their sizes; None for a missing file."""
    return tuple(_written(Path(folder) / name) for name in (CONFIG_NAME, WEIGHTS_NAME))


def _written(file: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4096)
def peft_type_in(folder: str, state: State) -> str:
    """Returns the method of a saved adapter in a state of its files."""
    return peft_type_of(folder)


@lru_cache(maxsize=4096)
def resolve(path: str) -> str:
    """Returns the folder of an adapter, which vLLM downloads where the path is the name of a repository.

    Raises:
        TenantError: there is neither a folder nor a repository.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    folder = get_adapter_absolute_path(path)
    if not os.path.isdir(folder):
        raise TenantError(f"The adapter {path!r} is neither a folder nor a repository that can be downloaded.")
    return folder


def is_para(request: Any) -> bool:
    """Whether a `LoRARequest` names a PARA adapter; None and unreadable folders are none."""
    if request is None:
        return False
    try:
        folder = resolve(request.lora_path)
        return peft_type_in(folder, state_of(folder)) == "PARA"
    except TenantError:
        return False
