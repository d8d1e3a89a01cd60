"""State shared by the target layers of a Transformer block, and by all blocks of a model."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..serving.tenants import BASE_ROWS
from .core.generator import VectorGenerator
from .core.scaling import OutputSlices
from .state import Call, ParaState, PromptEnd


if TYPE_CHECKING:
    from ..serving.rows import RowPlaces


class Target(Protocol):
    """The interface of a target layer that its block uses, see `layer.ParaLayer`.

    Attributes:
        name: its full name in the model.
        slices: which of its outputs are scaled.
        is_expert: whether it may be a mixture-of-experts expert, which sees a subset of the tokens in its own order.
        para_generator: adapter name -> the generator, on the layer that holds it for its block.
        para_target: adapter name -> the layer's name in the adapter's generator.
    """

    name: str
    slices: OutputSlices
    is_expert: bool
    para_generator: nn.ModuleDict
    para_target: dict[str, str]

    @property
    def disable_adapters(self) -> bool:
        """Whether the adapters are disabled."""

    @property
    def active_adapters(self) -> Any:
        """The active adapters."""


class ParaBlock:
    """The state shared by the target layers of one Transformer block. It is not a module, so nothing is saved twice.

    The first target layer of an adapter that runs in a call makes the vectors for all target layers of that adapter in
    the block, from its own input: the hidden states that enter the block. This happens inside the layer's `forward`,
    so that gradient checkpointing, which runs the block again, recomputes the vectors.

    Attributes:
        name: the block's name in the model.
        blocks: all blocks of the model.
        state: the state of the current thread.
        reads_memory: whether the block belongs to the decoder of an encoder-decoder model, whose prompt is the
            encoder's output.
        layers: the target layers of the block.
        owners: adapter name -> the layer that holds the adapter's generator.
    """

    def __init__(self, name: str, blocks: ParaBlocks, reads_memory: bool = False) -> None:
        self.name = name
        self.blocks = blocks
        self.state = blocks.state
        self.reads_memory = reads_memory
        self.layers: list[Target] = []
        self.owners: dict[str, Target] = {}

    def generator(self, adapter: str) -> VectorGenerator:
        """Returns the generator of an adapter that has a target in the block."""
        return self.owners[adapter].para_generator[adapter]  # type: ignore[return-value]

    def vector_for(self, layer: Target, call: Call, hidden: torch.Tensor) -> torch.Tensor | None:
        """Returns a layer's vector and stores it in the call.

        The vectors of several active adapters are multiplied. In a mixed batch each row gets the vector of its
        adapter.

        Args:
            layer: a layer of the block.
            call: the current call.
            hidden: the layer's input, which is pooled if the layer is the adapter's first target layer in the call.
        """
        adapters = [name for name in dict.fromkeys(call.rows or call.adapters) if name in layer.para_target]
        if call.has_no_rows and adapters:
            raise ValueError(
                f"{layer.name} runs over images or sounds, which PARA cannot assign to the rows of a mixed batch: run "
                "the rows of each adapter in a separate call, or leave this layer out of target_modules."
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
        self, layer: Target, adapters: list[str], call: Call, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the vectors of the block's targets, for one adapter or for several adapters of a mixed batch.

        In a mixed batch these are adapters whose generators have the same `stack_key`; all other rows get 1.

        Raises:
            ValueError: the hidden states and the prompt mask have different shapes.
        """
        generator = self.generator(adapters[0])
        hidden = self._prompt_states(layer, call, hidden)
        mask = call.prompts[generator.prompt_end].mask_for(hidden.shape[0], hidden.shape[1], hidden.device)
        if mask.shape[0] != hidden.shape[0] or mask.shape[2] != hidden.shape[1]:
            raise ValueError(
                f"The block {self.name} sees {hidden.shape[0]} x {hidden.shape[1]} tokens, but the prompt is known "
                f"for {mask.shape[0]} x {mask.shape[2]}: exclude blocks that do not process the text, such as a "
                "vision tower, with exclude_modules or a pattern in target_modules."
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

    def _prompt_states(self, layer: Target, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states to pool, (batch, tokens, d)."""
        if self.reads_memory:
            if call.memory is None:
                raise ValueError(
                    f"The decoder block {self.name} has no encoder output to pool: call the whole model, or pass "
                    "encoder_outputs or encoder_hidden_states."
                )
            return call.memory.to(hidden.device)
        batch = call.batch or len(call.rows or hidden)
        if self.dimension_of_rows(layer, call, hidden, batch) == 1:
            hidden = hidden.transpose(0, 1)
        if call.step is not None:
            return call.step.prompts_in(hidden)
        return hidden.reshape(batch, -1, hidden.shape[-1])

    def dimension_of_rows(self, layer: Target, call: Call, x: torch.Tensor, rows: int) -> int:
        """Returns the dimension of a layer's input or output that holds the rows of a call.

        Raises:
            ValueError: the dimension cannot be determined.
        """
        places, module, shape = self.blocks.places, cast(nn.Module, layer), x.shape
        is_plain = len(shape) > 2 and shape[0] == rows and (rows == 1 or shape[1] != rows)
        if is_plain and (torch.compiler.is_compiling() or not places.has_none(module)):
            return 0
        is_mixed = rows > 1 or call.step is not None
        is_some = len(shape) == 2 and ((layer.is_expert and is_mixed) or call.num_tokens not in (None, shape[0]))
        dimension = None if is_some else places.dimension(module, shape, rows, call.tokens)
        if dimension is None:
            raise ValueError(
                f"{layer.name} received a tensor of shape {tuple(shape)} in a call of {rows} rows, and PARA cannot "
                "tell which entries belong to which row: leave mixture-of-experts layers, vision towers and layers "
                "whose input is shared by all rows out of target_modules, with exclude_modules or a pattern."
            )
        return dimension


class ParaBlocks:
    """The adapted blocks of one model.

    Attributes:
        identifier: a unique id of the model. A cache stores it with the vectors.
        state: the state of the current thread.
        places: the dimensions in which the layers see the rows of a call.
    """

    def __init__(self) -> None:
        from ..serving.rows import RowPlaces

        self.identifier = uuid.uuid4().hex
        self.state = ParaState()
        self.places: RowPlaces = RowPlaces()
        self._by_name: dict[str, ParaBlock] = {}

    def block_of(self, module_name: str, model: Any) -> ParaBlock:
        """Returns the block that a module belongs to. A module outside of all blocks is its own block.

        Args:
            module_name: the module's full name.
            model: the adapted model.
        """
        parts = module_name.split(".")
        prefixes = [".".join(parts[:length]) for length in range(1, len(parts))]
        blocks = [name for name in prefixes if isinstance(model.get_submodule(name), GradientCheckpointingLayer)]
        numbered = [name for name in prefixes if name.rpartition(".")[2].isdigit()]
        name = next(iter(blocks[-1:] + numbered[:1]), module_name)
        if name not in self._by_name:
            self._by_name[name] = ParaBlock(name, self, reads_memory=_is_in_decoder(model.get_submodule(name), model))
        return self._by_name[name]

    def active_adapters(self) -> tuple[str, ...]:
        """Returns the adapters that are used in a forward pass: none while they are disabled."""
        layers = (layer for block in self._by_name.values() for layer in block.layers if not layer.disable_adapters)
        return tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

    def prompt_ends(self, adapters: tuple[str, ...]) -> set[PromptEnd]:
        """Returns the distinct `prompt_end` values of these adapters."""
        blocks = self._by_name.values()
        return {block.generator(name).prompt_end for block in blocks for name in adapters if name in block.owners}

    def names_for(self, module: Any, x: Any) -> Sequence[str] | None:
        """Returns the adapter of each input entry of a `modules_to_save` module; None outside of a mixed batch.

        Raises:
            ValueError: the dimension of the rows cannot be determined.
        """
        call = self.state.call
        if call is None or call.rows is None or not isinstance(x, torch.Tensor):
            return None
        rows = len(call.rows)
        if self.places.dimension(module, x.shape, rows, call.tokens) != 0:
            raise ValueError(
                f"{type(module).__name__} received a tensor of shape {tuple(x.shape)} in a mixed batch of {rows} "
                "rows, and PARA cannot tell which entries belong to which adapter: run the rows of each adapter in a "
                "separate call."
            )
        names = (name if name in module._adapters else BASE_ROWS for name in call.rows)
        return [name for name in names for _ in range(len(x) // rows)]


def _is_in_decoder(block: nn.Module, model: Any) -> bool:
    """Returns whether a block belongs to the decoder of an encoder-decoder model."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    encoder, decoder = model.get_encoder(), model.get_decoder()
    # `get_decoder` of an encoder-only model, such as an audio classifier, returns the model itself.
    in_encoder = encoder is not model and any(module is block for module in encoder.modules())
    return not in_encoder and any(module is block for module in decoder.modules())
