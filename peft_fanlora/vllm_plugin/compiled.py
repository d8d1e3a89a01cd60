"""A custom operator that scales the outputs of a layer, used by the hooks in compiled models.

Its work differs between steps, so it is opaque to torch.compile, and the graph is split at it, outside of CUDA graphs.
"""

from functools import partial
from typing import Any

import torch
from torch import library
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from .layout import Layout
from .vectors import Vectors


NAMESPACE, NAME, PREFIX = "peft_fanlora", "scale_layer", "para."
_LIBRARY = library.Library(NAMESPACE, "FRAGMENT")


def _scale_layer(inputs: torch.Tensor, outputs: torch.Tensor, layer: str) -> None:
    get_forward_context().no_compile_layers[PREFIX + layer](inputs, outputs)


def _nothing(inputs: torch.Tensor, outputs: torch.Tensor, layer: str) -> None:
    return None


direct_register_custom_op(NAME, _scale_layer, ["outputs"], _nothing, _LIBRARY)


def scale_layer(inputs: torch.Tensor, outputs: torch.Tensor, layer: str) -> None:
    """Generates the vectors that depend on a layer's inputs, and scales its outputs in place."""
    torch.ops.peft_fanlora.scale_layer(inputs, outputs, layer)


def register(vllm_config: Any, layout: Layout, vectors: Vectors) -> None:
    """Adds the layers to the forward context, where the operator looks them up, and the operator to the splitting ops.

    Args:
        vllm_config: configuration of the engine.
        layout: its layers.
        vectors: the vectors of the running requests.
    """
    compilation = vllm_config.compilation_config
    for layer in layout.layers:
        compilation.static_forward_context[PREFIX + layer.scaled.name] = partial(vectors.run, layer.scaled)
    if compilation.mode == CompilationMode.VLLM_COMPILE and compilation.splitting_ops is not None:
        name = f"{NAMESPACE}::{NAME}"
        if name not in compilation.splitting_ops:
            compilation.splitting_ops.append(name)


def refusal(compilation: Any, is_cpu: bool) -> str | None:
    """Returns the reason why a compilation config cannot be used with PARA; None if it can."""
    graphs = compilation.cudagraph_mode
    if not is_cpu and graphs is not None and graphs.has_full_cudagraphs():
        return "full CUDA graphs cannot contain PARA's operator: set cudagraph_mode=PIECEWISE or NONE"
    if not is_cpu and graphs != CUDAGraphMode.NONE and not compilation.splitting_ops:
        return "CUDA graphs are not split at attention: set cudagraph_mode=NONE, or keep the default splitting_ops"
    if compilation.use_inductor_graph_partition:
        return "use_inductor_graph_partition=True was not tested: set it to False"
    return None
