"""Layout of vLLM's packed and sharded layers in terms of the modules of transformers, and the hooks that scale them.

Does not import vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from .vectors import ScaledLayer, Vectors


@dataclass(frozen=True)
class Part:
    """A range of a layer's outputs on this tensor-parallel rank that belongs to one module of transformers.

    Attributes:
        module: full name of the module: vLLM's name of its parent, and its own last part.
        size: number of outputs.
        start: offset of the range in the outputs of the module.
    """

    module: str
    size: int
    start: int


@dataclass(frozen=True, eq=False)
class EngineLayer:
    """A linear layer of vLLM's model, which may be packed and sharded.

    Attributes:
        scaled: the layer's table of vectors.
        num_inputs: number of input features over all ranks.
        parts: the parts of its outputs on this rank, in order.
        reads_whole_input: whether the input is not sharded between ranks.
    """

    scaled: ScaledLayer
    num_inputs: int
    parts: Sequence[Part]
    reads_whole_input: bool

    def span(self, modules: Container[str]) -> tuple[int, int] | None:
        """Returns the smallest range of outputs that contains those of the given modules; None if there are none."""
        ends = list(accumulate((part.size for part in self.parts), initial=0))
        held = [index for index, part in enumerate(self.parts) if part.module in modules]
        return (ends[held[0]], ends[held[-1] + 1]) if held else None


@dataclass(frozen=True)
class Layout:
    """All layers of vLLM's model that can be scaled.

    Attributes:
        layers: the layers, in the order of a forward pass within each block.
        shapes: (inputs, outputs) over all ranks of each module of transformers that they compute.
    """

    layers: Sequence[EngineLayer]
    shapes: dict[str, tuple[int, int]]

    @property
    def scaled(self) -> list[ScaledLayer]:
        """The tables of the layers."""
        return [layer.scaled for layer in self.layers]


Compiled = Callable[[torch.Tensor, torch.Tensor, str], None]
"""Operator for compiled models with the arguments (inputs, outputs, layer name), which calls `Vectors.run`."""


def install(layout: Layout, modules: Sequence[nn.Module], vectors: Vectors, compiled: Compiled | None = None) -> None:
    """Registers the forward hooks that generate vectors and scale the outputs of layers.

    Args:
        layout: the layers.
        modules: the torch module of each layer.
        vectors: the vectors of the running requests.
        compiled: the operator that a hook calls while it is compiled; None if the model is never compiled.
    """
    for layer, module in zip(layout.layers, modules, strict=True):
        module.register_forward_hook(_hook(layer.scaled, vectors, compiled), with_kwargs=True)


def _hook(layer: ScaledLayer, vectors: Vectors, compiled: Compiled | None) -> Any:
    name = layer.name

    def scale(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = args[0] if args else next(iter(kwargs.values()))
        outputs = output[0] if isinstance(output, tuple) else output
        if compiled is not None and torch.compiler.is_compiling():
            compiled(inputs, outputs, name)
        else:
            vectors.run(layer, inputs, outputs)

    return scale
