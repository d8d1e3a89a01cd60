"""The forward of a LoRA layer in a batch with stacked adapters."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..serving.tenants import is_observed
from .run import CurrentRun, PackedRun, Run
from .stacks import AdapterStack, SharedAdapter


class LayerForward:
    """Runs a LoRA layer with the stacked adapters of the current batch, or as in PEFT if there are none for it.

    It is set as the instance attribute `forward`, which PyTorch finds first. A pair of hooks and PEFT's path for mixed
    batches together would cost about as much as the products of a single token.
    """

    def __init__(self, layer: Any, current: CurrentRun) -> None:
        self.layer = layer
        self.current = current

    def install(self) -> None:
        self.layer.forward = self
        self.layer._replicate_for_data_parallel = self.replicate_without_it

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, run = self.layer, self.current.run
        if run is None:
            return type(layer).forward(layer, *args, **kwargs)
        stack = run.batch.stacks.get(layer)
        if stack is not None and len(args) == 1 and not (kwargs or layer.disable_adapters or layer.merged_adapters):
            base = layer.base_layer
            result = base(*args)
            return stack.add_to(result.clone() if is_observed(base) else result, args[0], run)
        if not run.is_mixed:
            return type(layer).forward(layer, *args, **kwargs)
        if isinstance(run, PackedRun) and args and run.is_packed(args[0]):
            return self._mix(stack, run, args[0].transpose(0, 1), *args[1:], **kwargs).transpose(0, 1)
        return self._mix(stack, run, *args, **kwargs)

    def _mix(self, stack: AdapterStack | SharedAdapter | None, run: Run, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, x = self.layer, args[0] if args else cast(Any, kwargs.get("x"))
        kwargs["adapter_names"] = run.names_for(layer, x)
        output = type(layer).forward(layer, *args, **kwargs)
        return output if stack is None or layer.disable_adapters else stack.add_to(output, x, run)

    def replicate_without_it(self) -> nn.Module:
        """Returns a replica for `DataParallel` without this object, which would run the original layer."""
        replica = type(self.layer)._replicate_for_data_parallel(self.layer)
        del replica.forward, replica._replicate_for_data_parallel
        return replica


def can_stand_in(layer: Any) -> bool:
    """Returns whether a layer's `forward` can be replaced: it is not replaced yet, and PEFT can mix its adapters."""
    own = vars(layer).get("forward")
    is_free = own is None or isinstance(own, LayerForward)
    return is_free and type(layer)._check_forward_args is LoraLayer._check_forward_args
