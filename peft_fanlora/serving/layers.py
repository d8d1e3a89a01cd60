"""What the adapted layers of both methods have to know of the layers that they wrap."""

from typing import Any

from torch.nn.modules.module import _global_forward_hooks


def is_observed(layer: Any) -> bool:
    """Whether someone may hold on to what a layer returns, so that it must not be written to."""
    return bool(layer._forward_hooks or _global_forward_hooks or "forward" in vars(layer))
