"""The layers whose outputs PARA scales, and what the layers of a block share."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..serving.layers import is_observed
from .config import ParaConfig
from .generator import VectorGenerator
from .state import Call, ParaState
from .targets import OutputSlices


MERGE_REFUSAL = (
    "PARA cannot be merged: its vectors depend on the prompt, so that no single weight matrix holds them. Serve the "
    "adapter as it is, where a generated token costs one multiplication a target module more than the base model, or "
    "take the adapter off with unload()."
)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Returns the (inputs, outputs) of a linear layer: torch's, GPT-2's `Conv1D`, or a quantised one.

    Raises:
        TypeError: the module is not linear.
    """
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(module, BaseTunerLayer) or not all(isinstance(size, int) for size in shape):
        raise TypeError(
            f"PARA scales the output of linear layers, and {type(module).__name__} is not one: choose target_modules that "
            "name linear layers."
        )
    return shape  # type: ignore[return-value]


def scale(
    result: torch.Tensor, vector: torch.Tensor, segments: torch.Tensor | None = None, in_place: bool = False
) -> torch.Tensor:
    """Returns the output of a projection times its adjusting vector, y' = l ⊙ y [S].

    Args:
        result: y, (batch, …, outputs), or (batch * tokens, outputs) where a model flattens its tokens.
        vector: l, (batch, sequences, outputs).
        segments: the sequence of each token in a packed batch, (batch, tokens).
        in_place: whether to write into `result`, which is quicker for a single token.
    """
    if segments is not None:
        rows = torch.arange(vector.shape[0], device=vector.device).unsqueeze(1)
        vector = vector[rows, segments.to(vector.device)]
    if result.dim() == 2:
        batch, _, outputs = vector.shape
        vector = vector.expand(batch, result.shape[0] // batch, outputs).reshape(-1, outputs)
    elif result.dim() > 3:
        vector = vector.reshape(vector.shape[0], *(1 for _ in result.shape[2:]), vector.shape[-1])
    return result.mul_(vector) if in_place else (result * vector).to(result.dtype)


class ParaBlock:
    """What the target layers of one Transformer block share; not a module, so that nothing is saved twice.

    Whichever of an adapter's layers a call reaches first makes the vectors of all of them, from its own input: the
    hidden states with which the block begins. That happens inside of the layer's `forward`, so that gradient checkpointing, which
    runs the block again, makes them again.

    Attributes:
        name: the block's name in the model.
        state: the state of the model.
        reads_memory: whether the block belongs to the decoder of an encoder-decoder model, whose prompt is the
            encoder's output.
        layers: the target layers of the block.
        owners: adapter name -> the layer that holds the adapter's generator.
    """

    def __init__(self, name: str, state: ParaState, reads_memory: bool = False) -> None:
        self.name = name
        self.state = state
        self.reads_memory = reads_memory
        self.layers: list[ParaLayer] = []
        self.owners: dict[str, ParaLayer] = {}

    def generator(self, adapter: str) -> VectorGenerator:
        """Returns the generator of an adapter that has a target in the block."""
        return cast(VectorGenerator, self.owners[adapter].para_generator[adapter])

    def vector_for(self, layer: ParaLayer, call: Call, hidden: torch.Tensor) -> torch.Tensor | None:
        """Returns a layer's vector, and keeps it in the call.

        Several active adapters multiply; in a mixed batch each row takes the vector of its own adapter.

        Args:
            layer: a layer of the block.
            call: the current call.
            hidden: the layer's input, which is pooled if the layer is the first of an adapter's that the call reaches.
        """
        adapters = [name for name in dict.fromkeys(call.rows or call.adapters) if name in layer.para_target]
        if call.has_no_rows and adapters:
            raise ValueError(
                f"{layer.name} runs over images or sounds, of which PARA cannot tell whose row each belongs to in a mixed "
                "batch: run the rows of each adapter in a call of their own, or leave the tower out of target_modules."
            )
        groups: dict[Any, list[str]] = {}
        for adapter in adapters:
            if (self.name, adapter) not in call.made:
                stack_key = adapter if call.rows is None else self.generator(adapter).stack_key
                groups.setdefault(stack_key, []).append(adapter)
        for group in groups.values():
            made = self._make_vectors(layer, group, call, hidden)
            call.made.update({(self.name, adapter): made for adapter in group})
        vector = None
        distinct = {id(made): made for made in (call.made[self.name, adapter] for adapter in adapters)}
        for made in distinct.values():
            part = layer.slices.spread(made[layer.para_target[adapters[0]]])
            vector = part if vector is None else vector * part
        if call.step is not None:
            vector = call.step.with_kept(layer.name, vector)
        call.vectors[layer.name] = vector
        return vector

    def _make_vectors(
        self, layer: ParaLayer, adapters: list[str], call: Call, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the vectors for the targets in the block: of one adapter, or of some of a mixed batch.

        In a mixed batch these are adapters whose generators have the same `stack_key`, and the rows of all others have 1.

        Raises:
            ValueError: the hidden states do not have the tokens that the prompt mask speaks of.
        """
        generator = self.generator(adapters[0])
        hidden = self._prompt_states(layer, call, hidden)
        mask = call.prompts[generator.prompt_end].mask_for(hidden.shape[0], hidden.shape[1], hidden.device)
        if mask.shape[0] != hidden.shape[0] or mask.shape[2] != hidden.shape[1]:
            raise ValueError(
                f"The block {self.name} sees {hidden.shape[0]} x {hidden.shape[1]} tokens, but the prompt is known for "
                f"{mask.shape[0]} x {mask.shape[2]}: take blocks that do not run over the text, such as a vision tower, "
                "out of the targets with exclude_modules or a pattern in target_modules."
            )
        if call.rows is None:
            return generator(hidden, mask)
        own = [row for row, name in enumerate(call.rows) if name in adapters]
        generators = [self.generator(call.rows[row]) for row in own]
        if len(own) == len(hidden):
            return VectorGenerator.batched(generators, hidden, mask)
        rows = torch.tensor(own, device=hidden.device)
        return {
            target: vector.new_ones(hidden.shape[0], *vector.shape[1:]).index_copy(0, rows, vector)
            for target, vector in VectorGenerator.batched(generators, hidden[rows], mask[rows]).items()
        }

    def _prompt_states(self, layer: ParaLayer, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states to pool, (batch, tokens, d)."""
        if self.reads_memory:
            if call.memory is None:
                raise ValueError(
                    f"The decoder block {self.name} has no encoder output to pool: call the whole model, or pass "
                    "encoder_outputs or encoder_hidden_states."
                )
            return call.memory.to(hidden.device)
        batch = call.batch or len(call.rows or hidden)
        if layer.dimension_of_rows(call, hidden, batch) == 1:
            hidden = hidden.transpose(0, 1)
        if call.step is not None:
            return call.step.prompts_in(hidden)
        return hidden.reshape(batch, -1, hidden.shape[-1])


class ParaLayer(nn.Module, BaseTunerLayer):
    """A linear layer whose output the prompt's vector scales: y' = l ⊙ (W x + b).

    The first target of each block holds the block's generator, and the others read its vectors.

    Args:
        base_layer: the layer to scale.
        name: its full name in the model.
        block: what it shares with the other targets of its block.
        slices: which of its outputs are scaled.
        is_expert: whether it may be an expert of a mixture, which sees some of the tokens, in an order of its own.
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
        """Makes the layer a target of one more adapter.

        The first target of the block makes the generator, and each adds its own up-projection to it.

        Args:
            adapter_name: the name of the adapter.
            config: its configuration.
        """
        owner = self.block.owners.setdefault(adapter_name, self)
        if owner is self:
            owner.para_generator[adapter_name] = VectorGenerator(
                self.in_features,
                config.r,
                pooling=config.pooling,
                activation=config.activation,
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
            RuntimeError: no call of the model is running, so that no prompt is known.
            ValueError: the layer sees some of the tokens, or the cache holds no vector for it.
        """
        result = self.base_layer(x, *args, **kwargs)
        if self._disable_adapters or not self.para_target:
            return result
        call = self.block.state.current.call
        if call is None:
            raise RuntimeError(
                f"{self.name} ran outside of a call of its model, where PARA knows no prompt. Call the model rather "
                "than its blocks, and for activation checkpointing use model.gradient_checkpointing_enable() rather "
                "than a wrapper around the blocks."
            )
        if self.name in call.vectors:
            vector = call.vectors[self.name]
        elif call.from_cache:
            raise ValueError(
                f"The cache holds no vector for {self.name}: it was filled by a call that left this layer out. "
                "Fill a new cache with the prompt."
            )
        else:
            vector = self.block.vector_for(self, call, x)
        if vector is None:
            return result
        in_place = not (torch.is_grad_enabled() or is_observed(self.base_layer))
        if self.dimension_of_rows(call, result, len(vector)) == 1:
            return scale(result.transpose(0, 1), vector, call.segments, in_place).transpose(0, 1)
        return scale(result, vector, call.segments, in_place)

    def dimension_of_rows(self, call: Call, x: torch.Tensor, rows: int) -> int:
        """Returns the dimension of the layer's input or output that holds the rows of the call.

        Raises:
            ValueError: that is not certain.
        """
        places = self.block.state.places
        is_plain = x.dim() > 2 and len(x) == rows and (rows == 1 or x.shape[1] != rows)
        if is_plain and (torch.compiler.is_compiling() or not places.has_none(self)):
            return 0
        is_mixed = rows > 1 or call.step is not None
        is_some = x.dim() == 2 and ((self.is_expert and is_mixed) or call.num_tokens not in (None, len(x)))
        dimension = None if is_some else places.dimension(self, x.shape, rows, call.tokens)
        if dimension is None:
            raise ValueError(
                f"{self.name} saw a tensor of the shape {tuple(x.shape)} in a call of {rows} rows, so that PARA cannot tell "
                "which row's vector each entry takes: leave the experts of a mixture, vision towers and what all rows "
                "share out of target_modules, with exclude_modules or a pattern."
            )
        return dimension

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuses: the vectors depend on the prompt.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(MERGE_REFUSAL)

    def unmerge(self) -> None:
        """Does nothing, as nothing can have been merged."""

    def __repr__(self) -> str:
        return "para." + super().__repr__()


class ParaLinear(ParaLayer):
    """The layer by the name that PEFT knows adapted linear layers by, where "all-linear" looks for a further adapter's."""
