"""Maps the linear layers of a vLLM model to the modules of transformers that each of them computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from .layout import EngineLayer, Layout, Part
from .vectors import ScaledLayer


def find_layers(
    model: nn.Module, packed_modules: Mapping[str, Sequence[str]], num_slots: int, device: torch.device
) -> tuple[Layout, list[nn.Module]]:
    """Returns the linear layers of a model that can be scaled, and the torch module of each.

    Args:
        model: vLLM's model, with or without LoRA layers.
        packed_modules: packed layer -> modules of transformers that it computes, by the last part of their names.
        num_slots: number of rows of the tables, one more than requests in a batch.
        device: device of the tables.
    """
    layers: list[EngineLayer] = []
    shapes: dict[str, tuple[int, int]] = {}
    modules: list[nn.Module] = []
    inside = "."
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", module)  # vLLM's LoRA layers wrap it
        if not isinstance(base, LinearBase) or name.startswith(inside):
            continue
        inside = name + "."
        found = _parts(name, base, packed_modules)
        if found is None:
            continue
        parts, outputs = found
        scaled = ScaledLayer(name, num_slots, device)
        whole = not isinstance(base, RowParallelLinear) or base.tp_size == 1
        layers.append(EngineLayer(scaled, base.input_size, parts, whole))
        modules.append(module)
        shapes |= {part: (base.input_size, size) for part, size in outputs.items()}
    return Layout(layers, shapes), modules


def _parts(
    name: str, layer: LinearBase, packed_modules: Mapping[str, Sequence[str]]
) -> tuple[list[Part], dict[str, int]] | None:
    """Returns the parts of a layer on this tensor-parallel rank, and the outputs of each module over all ranks.

    None for layers that cannot be scaled.
    """
    parent, _, leaf = name.rpartition(".")
    rank = layer.tp_rank
    # (outputs over all ranks, outputs on this rank, offset of this rank)
    sizes: list[tuple[int, int, int]]
    if isinstance(layer, QKVParallelLinear):
        if layer.v_head_size != layer.head_size or type(layer).forward is not ColumnParallelLinear.forward:
            return None
        query, key = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
        keys = layer.total_num_kv_heads * layer.head_size, key, rank // layer.num_kv_head_replicas * key
        sizes = [(layer.total_num_heads * layer.head_size, query, rank * query), keys, keys]
    elif isinstance(layer, MergedColumnParallelLinear):
        shares = [size // layer.tp_size for size in layer.output_sizes]
        sizes = [(size, share, rank * share) for size, share in zip(layer.output_sizes, shares, strict=True)]
    elif isinstance(layer, ColumnParallelLinear) and not layer.gather_output:
        share = layer.output_size_per_partition
        sizes = [(layer.output_size, share, rank * share)]
    elif isinstance(layer, (ColumnParallelLinear, ReplicatedLinear)) or (
        isinstance(layer, RowParallelLinear) and layer.reduce_results
    ):
        sizes = [(layer.output_size, layer.output_size, 0)]
    else:
        return None

    prefix = parent + "." if parent else ""
    names = packed_modules.get(leaf, [leaf])
    if len(names) == len(sizes):
        modules = [prefix + part for part in names]
        return (
            [Part(module, share, start) for module, (_, share, start) in zip(modules, sizes, strict=True)],
            {module: size for module, (size, _, _) in zip(modules, sizes, strict=True)},
        )
    if len(names) > 1:
        return None
    # Fused in transformers too, where the parts are concatenated.
    parts, before = [], 0
    for size, share, start in sizes:
        parts.append(Part(prefix + names[0], share, before + start))
        before += size
    return parts, {prefix + names[0]: before}
