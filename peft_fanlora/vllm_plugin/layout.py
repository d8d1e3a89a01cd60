"""Which outputs of the engine's layers are those of which module of transformers, and the hooks that scale them.

Needs no vLLM.
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
    """A run of a layer's outputs on this rank, and where it lies among the outputs of a module of transformers.

    Attributes:
        module: the module's full name, with vLLM's name of what contains it.
        size: how many outputs.
        start: the first of them in the module.
    """

    module: str
    size: int
    start: int


@dataclass(frozen=True, eq=False)
class EngineLayer:
    """A linear layer of the engine.

    Attributes:
        scaled: its table.
        num_inputs: the width of its whole input, over all ranks.
        parts: what its outputs are, in order.
        reads_whole_input: whether this rank sees all of the input.
    """

    scaled: ScaledLayer
    num_inputs: int
    parts: Sequence[Part]
    reads_whole_input: bool

    def span(self, modules: Container[str]) -> tuple[int, int] | None:
        """Returns the run of outputs that holds those of some modules; None where there are none."""
        ends = list(accumulate((part.size for part in self.parts), initial=0))
        held = [index for index, part in enumerate(self.parts) if part.module in modules]
        return (ends[held[0]], ends[held[-1] + 1]) if held else None


@dataclass(frozen=True)
class Layout:
    """All layers of an engine that can be scaled.

    Attributes:
        layers: the layers, in the order in which a call of the model reaches them inside of a block.
        shapes: the (inputs, outputs) of each module of transformers that they compute, over all ranks.
    """

    layers: Sequence[EngineLayer]
    shapes: dict[str, tuple[int, int]]

    @property
    def scaled(self) -> list[ScaledLayer]:
        """The layers' tables."""
        return [layer.scaled for layer in self.layers]


Compiled = Callable[[torch.Tensor, torch.Tensor, str], None]
"""Does what a hook does, given a layer's inputs, outputs and name, as an operator that a compiler leaves as it is."""


def install(layout: Layout, modules: Sequence[nn.Module], vectors: Vectors, compiled: Compiled | None = None) -> None:
    """Lets layers make their vectors and scale their outputs.

    Args:
        layout: the layers.
        modules: the module of each.
        vectors: the vectors of the running requests.
        compiled: what stands for a hook in a compiled model; None where the model is not compiled.
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
