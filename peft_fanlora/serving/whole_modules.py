"""Modules that each adapter trains and saves whole, in a mixed batch: each row takes its own adapter's copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from .tenants import BASE_ROWS, adapted_modules


class WholeModules:
    """The hooks on the modules saved whole of one adapted model.

    They stay, and look at each call for the rows of the thread that makes it: hooks for the length of a call would be seen
    by the calls of all other threads.

    Args:
        rows: returns the adapter of each entry of an input's first dimension, given the module and the input; None
            outside of a mixed batch.
    """

    def __init__(self, rows: Callable[[nn.Module, torch.Tensor], Sequence[str] | None]) -> None:
        self.rows = rows

    def install(self, model: nn.Module) -> None:
        """Puts the hooks on those modules that have none yet."""
        for module in adapted_modules(model):
            hooks = module._forward_pre_hooks.values()
            if isinstance(module, AuxiliaryTrainingWrapper) and not any(isinstance(h, WholeModules) for h in hooks):
                module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        rows = self.rows(module, args[0]) if args else None
        if rows is None:
            return None
        return args, {**kwargs, "adapter_names": [name if name in module._adapters else BASE_ROWS for name in rows]}
