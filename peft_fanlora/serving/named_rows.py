"""Passes the adapter of each row in a mixed batch to PEFT's own modules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn


class NamedRows:
    """A forward hook that passes `adapter_names` to PEFT's modules.

    It is permanent, and looks up the rows of the calling thread: a hook for a single call would also affect the calls
    of all other threads.

    Args:
        names_for: returns the adapter of each entry of an input's first dimension, given the module and the input;
            None outside of a mixed batch.
    """

    def __init__(self, names_for: Callable[[Any, Any], Sequence[str] | None]) -> None:
        self.names_for = names_for

    def install(self, modules: Iterable[nn.Module]) -> None:
        """Adds the hook to those modules that do not have it yet."""
        for module in modules:
            hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, NamedRows))
            if not any(hook.names_for == self.names_for for hook in hooks):
                module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, *call: Any) -> tuple[Any, Any] | None:
        # PyTorch registers a hook and its `with_kwargs` flag separately: a thread that runs the module in between
        # passes fewer arguments.
        args, kwargs = (*call, {})[:2]
        names = self.names_for(module, args[0] if args else kwargs.get("x"))
        return None if names is None else (args, {**kwargs, "adapter_names": names})
