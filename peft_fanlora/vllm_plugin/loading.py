"""Loads a PARA adapter and maps its generators to the layers of vLLM on this rank; does not import vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..para.activations import make_activation
from ..para.core.generator import VectorGenerator
from ..para.targets import scaled_outputs
from .layout import EngineLayer, Layout
from .tenants import UP, SavedBlock, TenantConfig, TenantError, check_blocks, read_blocks, read_config
from .vectors import Block, Scaled, Tenant


def load_tenant(
    folder: str | Path,
    layout: Layout,
    model_config: Any,
    device: torch.device,
    rename: Callable[[str], str] = str,
) -> Tenant:
    """Returns the PARA adapter in a folder, ready to serve. A failed call does not affect other adapters.

    Args:
        folder: folder that `save_pretrained` wrote.
        layout: the layers of the engine.
        model_config: the configuration of the model in transformers.
        device: device of the engine.
        rename: maps the name of a module in transformers to its name in vLLM.

    Raises:
        TenantError: the folder cannot be read, or the adapter does not fit the model.
    """
    config = read_config(folder)
    modules = check_blocks(read_blocks(folder, shapes_only=True), config, layout.shapes, model_config, folder, rename)
    saved = read_blocks(folder)
    with torch.inference_mode(False):
        blocks = [
            _block(block, targets, config, layout, model_config, device, folder)
            for block, targets in zip(saved, modules, strict=True)
        ]
    return Tenant(blocks, config.prompt_end)


def _block(
    saved: SavedBlock,
    targets: dict[str, str],
    config: TenantConfig,
    layout: Layout,
    model_config: Any,
    device: torch.device,
    folder: str | Path,
) -> Block:
    ups = {}
    for target, module in targets.items():
        up, outputs = saved.parts[UP + target].float(), layout.shapes[module][1]
        slices = scaled_outputs(model_config, module, outputs)
        ups[module] = up.new_zeros(outputs, config.r)
        ups[module][slices.spread(torch.zeros(slices.num_scaled)) == 0] = up
    spans = [(layer, span) for layer in layout.layers if (span := layer.span(ups)) is not None]
    first = spans[0][0]
    owner = saved.owner.removeprefix(saved.prefix)
    if not any(part.module.endswith(owner) for part in first.parts):
        raise TenantError(
            f"The adapter in {str(folder)!r} has a generator at {saved.owner!r}, but the first target that vLLM "
            f"computes in this block is {first.scaled.name!r}: serve this adapter with transformers."
        )
    if not first.reads_whole_input:
        raise TenantError(
            f"The adapter in {str(folder)!r} has a generator at {first.scaled.name!r}, whose input is sharded between "
            "tensor-parallel ranks: serve it with tensor_parallel_size=1, or train it with a target before that "
            "layer, such as the query projection."
        )
    generator = VectorGenerator(
        first.num_inputs, config.r, config.pooling, make_activation(config.activation), prompt_end=config.prompt_end
    )
    state = {name: part.float() for name, part in saved.parts.items() if not name.startswith(UP)}
    scaled = {}
    for index, (layer, (start, stop)) in enumerate(spans):
        scaled[str(index)] = Scaled(layer.scaled, start)
        generator.add_target(str(index), stop - start)
        state[f"{UP}{index}"] = _rows_of(layer, ups, config.r)[start:stop]
    generator.float().load_state_dict(state)
    generator.eval().requires_grad_(False).to(device)
    for layer, span in spans:
        layer.scaled.cover(*span)
    return Block(first.scaled, generator, scaled)


def _rows_of(layer: EngineLayer, ups: dict[str, torch.Tensor], r: int) -> torch.Tensor:
    """Returns the up-projection of a layer's outputs on this rank, (outputs, r), zero where nothing is scaled."""
    parts = [
        ups[part.module][part.start : part.start + part.size] if part.module in ups else torch.zeros(part.size, r)
        for part in layer.parts
    ]
    return torch.cat(parts)
