"""Gives PEFT's own modules the adapter of each row in a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn


class NamedRows:
    """A forward hook that passes PEFT's modules their `adapter_names`.

    It stays, and looks at each call for the rows of the thread that makes it: a hook for the length of a call would be seen
    by the calls of all other threads.

    Args:
        names_for: returns the adapter of each entry of an input's first dimension, given the module and the input; None
            outside of a mixed batch.
    """

    def __init__(self, names_for: Callable[[Any, Any], Sequence[str] | None]) -> None:
        self.names_for = names_for

    def install(self, modules: Iterable[nn.Module]) -> None:
        """Puts the hook on those modules that do not have it yet."""
        for module in modules:
            hooks = (hook for hook in module._forward_pre_hooks.values() if isinstance(hook, NamedRows))
            if not any(hook.names_for == self.names_for for hook in hooks):
                module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, *call: Any) -> tuple[Any, Any] | None:
        # PyTorch enters a hook, and that it takes keyword arguments, one after the other: another thread that runs the
        # module in between passes fewer arguments.
        args, kwargs = (*call, {})[:2]
        names = self.names_for(module, args[0] if args else kwargs.get("x"))
        return None if names is None else (args, {**kwargs, "adapter_names": names})
