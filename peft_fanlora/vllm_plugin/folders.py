"""Cached look-ups of adapter folders in the front-end process and the scheduler."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from .tenants import CONFIG_NAME, WEIGHTS_NAME, TenantError, peft_type_of


State = tuple[tuple[int, int] | None, ...]


def state_of(folder: str) -> State:
    """Returns modification time (ns) and size (bytes) of an adapter's config and weights; None for a missing file."""
    return tuple(_written(Path(folder) / name) for name in (CONFIG_NAME, WEIGHTS_NAME))


def _written(file: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=4096)
def peft_type_in(folder: str, state: State) -> str:
    """Returns the `peft_type` of a saved adapter, cached until its files change."""
    return peft_type_of(folder)


@lru_cache(maxsize=4096)
def resolve(path: str) -> str:
    """Returns the local folder of an adapter; vLLM downloads it if the path is a repository id.

    Raises:
        TenantError: the path is neither a folder nor a repository.
    """
    from vllm.lora.utils import get_adapter_absolute_path

    folder = get_adapter_absolute_path(path)
    if not os.path.isdir(folder):
        raise TenantError(
            f"The adapter path {path!r} is neither a folder nor a repository that can be downloaded: pass the folder "
            "that save_pretrained wrote."
        )
    return folder


def is_para(request: Any) -> bool:
    """Returns whether a `LoRARequest` names a PARA adapter; False for None and for unreadable folders."""
    if request is None:
        return False
    try:
        folder = resolve(request.lora_path)
        return peft_type_in(folder, state_of(folder)) == "PARA"
    except TenantError:
        return False
