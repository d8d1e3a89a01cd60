"""Checks of base layers, used by the adapted layers of both methods."""

from typing import Any

from torch.nn.modules.module import _global_forward_hooks


def is_observed(layer: Any) -> bool:
    """Returns whether other code, such as a hook, may keep a layer's output, so that it must not be overwritten."""
    return bool(layer._forward_hooks or _global_forward_hooks or "forward" in vars(layer))
