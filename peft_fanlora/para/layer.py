"""The layers that scale outputs by PARA's vectors."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..serving.tenants import is_observed
from .activations import make_activation
from .blocks import ParaBlock
from .config import ParaConfig
from .core.generator import VectorGenerator
from .core.scaling import OutputSlices, scale
from .targets import linear_shape


MERGE_REFUSAL = (
    "PARA cannot be merged: its vectors depend on the prompt, so no single weight matrix can hold them. Serve the "
    "adapter unmerged, at the cost of one multiplication per target module and generated token, or remove it with "
    "unload()."
)


class ParaLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose output is scaled by a vector of the prompt: y' = l ⊙ (W x + b).

    The first target of each block holds the block's generator, and the others read its vectors.

    Args:
        base_layer: the layer to scale.
        name: its full name in the model.
        block: the state that it shares with the other targets of its block.
        slices: which of its outputs are scaled.
        is_expert: whether it may be a mixture-of-experts expert, which sees a subset of the tokens in its own order.
    """

    adapter_layer_names = ("para_generator",)
    other_param_names = ("para_target",)

    def __init__(
        self, base_layer: nn.Module, name: str, block: ParaBlock, slices: OutputSlices, is_expert: bool = False
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(base_layer)
        self.name = name
        self.block = block
        self.slices = slices
        self.is_expert = is_expert
        self.para_generator = nn.ModuleDict()
        self.para_target: dict[str, str] = {}
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        block.layers.append(self)

    def update_layer(self, adapter_name: str, config: ParaConfig) -> None:
        """Adds an adapter to the layer.

        The first target of the block creates the generator, and each target adds its up-projection to it.

        Args:
            adapter_name: the name of the adapter.
            config: its configuration.
        """
        owner = cast("ParaLayer", self.block.owners.setdefault(adapter_name, self))
        if owner is self:
            owner.para_generator[adapter_name] = VectorGenerator(
                self.in_features,
                config.r,
                config.pooling,
                make_activation(config.activation),
                dropout=config.para_dropout,
                prompt_end=None if config.prompt_end_token_ids is None else tuple(config.prompt_end_token_ids),
            )
        target = self.name.removeprefix(self.block.name + ".").replace(".", "_")
        generator = cast(VectorGenerator, owner.para_generator[adapter_name])
        generator.add_target(target, self.slices.num_scaled, identity=config.init_para_weights)
        self.para_target[adapter_name] = target
        owner._move_adapter_to_device_of_base_layer(adapter_name)

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter from the layer.

        Args:
            adapter_name: the name of the adapter.
        """
        super().delete_adapter(adapter_name)
        if self.block.owners.get(adapter_name) is self:
            del self.block.owners[adapter_name]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Returns the base layer's output, scaled by the vector of the current call's prompt.

        Raises:
            RuntimeError: no call of the model is running, so that there is no prompt.
            ValueError: the layer sees only some of the tokens, or the cache holds no vector for it.
        """
        base_layer = self.base_layer
        result = base_layer(x, *args, **kwargs)
        if self._disable_adapters or not self.para_target:
            return result
        call = self.block.state.call
        if call is None:
            raise RuntimeError(
                f"{self.name} ran outside of a call of its model, where PARA has no prompt. Call the model instead of "
                "its blocks, and for activation checkpointing use model.gradient_checkpointing_enable() instead of "
                "wrapping the blocks."
            )
        if self.name in call.vectors:
            vector = call.vectors[self.name]
        elif call.from_cache:
            raise ValueError(
                f"The cache holds no vector for {self.name}, because the call that filled it skipped this layer. Fill "
                "a new cache with the prompt."
            )
        else:
            vector = self.block.vector_for(self, call, x)
        if vector is None:
            return result
        in_place = not (torch.is_grad_enabled() or is_observed(base_layer))
        if self.block.dimension_of_rows(self, call, result, vector.shape[0]) == 1:
            return scale(result.transpose(0, 1), vector, call.segments, in_place).transpose(0, 1)
        return scale(result, vector, call.segments, in_place)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not supported, since the vectors depend on the prompt.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Does nothing, since PARA is never merged."""

    def __repr__(self) -> str:
        return "para." + super().__repr__()


class ParaLinear(ParaLayer):
    """A `ParaLayer` with the class name by which PEFT recognises adapted linear layers for "all-linear"."""
