"""Reads and checks saved PARA adapters; does not import vLLM."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..para.activations import is_activation, make_activation
from ..para.core.generator import POOLINGS
from ..para.targets import linear_shape, scaled_outputs
from ..sharing import reading


CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX, GENERATOR, UP = "base_model.model.", ".para_generator.", "up_"


class TenantError(ValueError):
    """Raised for an adapter folder that cannot be served."""


@dataclass(frozen=True)
class TenantConfig:
    """The part of a PARA adapter's config that defines its generators.

    Attributes:
        r: bottleneck dimension of the generators.
        pooling: one of `POOLINGS`.
        activation: name of the activation.
        prompt_end: `prompt_end_token_ids` of the adapter, the token ids that end a prompt.
    """

    r: int
    pooling: str
    activation: str
    prompt_end: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SavedBlock:
    """The saved generator of one Transformer block.

    Attributes:
        owner: name of the module that has the generator.
        prefix: name of the block with a trailing dot; "" for a module outside of the blocks.
        parts: parameter name in the generator -> tensor, or its shape.
    """

    owner: str
    prefix: str
    parts: dict[str, Any]

    @property
    def ups(self) -> dict[str, Any]:
        """The up-projections: target name -> tensor, or its shape."""
        return {name.removeprefix(UP): part for name, part in self.parts.items() if name.startswith(UP)}


def peft_type_of(folder: str | Path) -> str:
    """Returns the `peft_type` of a saved adapter, such as "PARA" or "LORA".

    Raises:
        TenantError: the folder has no readable adapter config.
    """
    return str(read_json(folder).get("peft_type"))


def read_json(folder: str | Path) -> dict[str, Any]:
    """Returns the content of an adapter's config file.

    Raises:
        TenantError: the file does not exist, or cannot be read.
    """
    folder = Path(folder)
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        raise TenantError(
            f"The adapter folder {str(folder)!r} does not exist: pass the folder that save_pretrained wrote."
        )
    if not file.exists():
        raise TenantError(
            f"{str(folder)!r} has no {CONFIG_NAME}, so it is not an adapter: pass a folder that save_pretrained wrote."
        )
    try:
        content = reading.read_json(file)
    except (OSError, ValueError) as error:
        raise TenantError(f"{str(file)!r} cannot be read ({error}): save the adapter again.") from error
    if not isinstance(content, dict):
        raise TenantError(
            f"{str(file)!r} contains a {type(content).__name__} instead of an object: save the adapter again."
        )
    return content


def read_config(folder: str | Path) -> TenantConfig:
    """Returns the config of a PARA adapter.

    Raises:
        TenantError: it is the config of another method, or has a value that is invalid or cannot be served.
    """
    content = read_json(folder)
    where = str(Path(folder) / CONFIG_NAME)
    if content.get("peft_type") != "PARA":
        raise TenantError(f"{where!r} has peft_type {content.get('peft_type')!r}: pass a PARA adapter.")
    for name, what in (("modules_to_save", "modules"), ("trainable_token_indices", "embeddings")):
        if content.get(name):
            raise TenantError(
                f"{where!r} has {name}={content[name]!r}, but vLLM shares these {what} between all requests: train "
                f"without {name}, or serve this adapter with transformers."
            )
    r, pooling, activation = content.get("r"), content.get("pooling"), content.get("activation")
    end = content.get("prompt_end_token_ids")
    if not isinstance(r, int) or not _is_count(r) or r < 1:
        raise TenantError(f"{where!r} has r={r!r}, which is not a positive integer: save the adapter again.")
    if pooling not in POOLINGS:
        raise TenantError(
            f"{where!r} has pooling={pooling!r}, but this peft-fanlora supports {', '.join(POOLINGS)}: update it."
        )
    if not isinstance(activation, str) or not is_activation(activation):
        raise TenantError(
            f"{where!r} has activation={activation!r}, which the installed transformers does not have: update it."
        )
    if end is not None and (not isinstance(end, list) or not end or not all(map(_is_count, end))):
        raise TenantError(
            f"{where!r} has prompt_end_token_ids={end!r}, which is not a list of token ids: save the adapter again."
        )
    return TenantConfig(r, pooling, activation, None if end is None else tuple(end))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_blocks(folder: str | Path, shapes_only: bool = False) -> list[SavedBlock]:
    """Returns the saved generators, one for each block.

    Args:
        folder: the adapter's folder.
        shapes_only: whether to return shapes instead of tensors, for which only the header of the file is read.

    Raises:
        TenantError: the file is missing or damaged, or has tensors that do not belong to a generator.
    """
    file = Path(folder) / WEIGHTS_NAME
    if not file.is_file():
        raise TenantError(f"{str(folder)!r} has no {WEIGHTS_NAME}: save the adapter with safetensors, PEFT's default.")
    blocks: dict[str, SavedBlock] = {}
    try:
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                owner, generator, part = key.removeprefix(PREFIX).partition(GENERATOR)
                if not generator:
                    raise TenantError(
                        f"{str(file)!r} has {key!r}, which is not a parameter of a PARA generator, and vLLM shares "
                        "all other weights between all requests: serve this adapter with transformers."
                    )
                block = blocks.setdefault(owner, SavedBlock(owner, _block_prefix(owner), {}))
                value = tuple(tensors.get_slice(key).get_shape()) if shapes_only else tensors.get_tensor(key)
                block.parts[part] = value
    except (OSError, SafetensorError) as error:
        raise TenantError(
            f"{str(file)!r} cannot be read ({error}): it is damaged or incomplete; save the adapter again."
        ) from error
    if not blocks:
        raise TenantError(f"{str(file)!r} has no generators: save the adapter again.")
    return list(blocks.values())


def _block_prefix(module: str) -> str:
    """Returns the name of a module's block with a trailing dot: the module's name up to its first number."""
    parts = module.split(".")
    depth = next((index + 1 for index, part in enumerate(parts[:-1]) if part.isdigit()), 0)
    return "".join(part + "." for part in parts[:depth])


def check_blocks(
    blocks: Sequence[SavedBlock],
    config: TenantConfig,
    shapes: Mapping[str, tuple[int, int]],
    model_config: Any,
    folder: str | Path,
    rename: Callable[[str], str] = str,
) -> list[dict[str, str]]:
    """Checks that the shapes of saved generators match the linear layers of a model.

    Args:
        blocks: the generators, from `read_blocks` with `shapes_only`.
        config: the adapter's config.
        shapes: name of each linear layer of the model -> (inputs, outputs).
        model_config: the configuration of the model in transformers.
        folder: the adapter's folder, for error messages.
        rename: maps the name of a module in transformers to its name in `shapes`.

    Returns:
        For each block, target name -> name of the module in `shapes`.

    Raises:
        TenantError: the adapter does not fit the model, or vLLM cannot serve its targets.
    """
    activation = {name: tuple(value.shape) for name, value in make_activation(config.activation).state_dict().items()}
    found = []
    for block in blocks:
        owner, prefix = rename(block.owner), rename(block.prefix)
        if owner not in shapes:
            raise TenantError(
                f"{str(folder)!r} has a generator at {block.owner!r}, which is not a linear layer of the served model "
                "that can be scaled: the adapter belongs to another base model, or its targets are not linear layers "
                "in vLLM (experts, compressed attention). Serve it on its own base model, or with transformers."
            )
        width = shapes[owner][0]
        expected = {"down": (config.r, width)} | {f"activation.{name}": shape for name, shape in activation.items()}
        if POOLINGS[config.pooling].has_query:
            expected["query"] = (width,)
        targets = _targets(block, owner, prefix, shapes, folder)
        for target, module in targets.items():
            scaled = scaled_outputs(model_config, module, shapes[module][1])
            if scaled.groups > 1 or not _is_contiguous(scaled.sections):
                raise TenantError(
                    f"{str(folder)!r} scales {module!r}, whose fused outputs have another order in vLLM: serve this "
                    "adapter with transformers."
                )
            expected[UP + target] = (scaled.num_scaled, config.r)
        _compare(block, expected, folder)
        found.append(targets)
    return found


def _is_contiguous(sections: Sequence[tuple[int, bool]]) -> bool:
    """Returns whether a projection is not fused, or is a concatenation of Q, K and V, or of gate and up."""
    return len(sections) <= 3


def _targets(
    block: SavedBlock, owner: str, prefix: str, shapes: Mapping[str, tuple[int, int]], folder: str | Path
) -> dict[str, str]:
    """Returns target name -> module name; a target is named like its module in the block, with "_" for each dot."""
    modules = [name for name in shapes if name.startswith(prefix)] if prefix else [owner]
    by_target = {name.removeprefix(prefix).replace(".", "_"): name for name in modules}
    targets = {}
    for target in block.ups:
        if target not in by_target:
            raise TenantError(
                f"{str(folder)!r} scales {target!r} in {block.prefix or block.owner!r}, which is not a linear layer "
                "of the served model that can be scaled: the adapter belongs to another base model, or its targets "
                "are not linear layers in vLLM. Serve it on its own base model, or with transformers."
            )
        targets[target] = by_target[target]
    if not targets:
        raise TenantError(
            f"{str(folder)!r} has a generator without targets at {block.owner!r}: save the adapter again."
        )
    return targets


def _compare(block: SavedBlock, expected: Mapping[str, tuple[int, ...]], folder: str | Path) -> None:
    for name in sorted(expected.keys() | block.parts.keys()):
        shape, wanted = block.parts.get(name), expected.get(name)
        if shape is None or wanted is None:
            lacks = "lacks" if shape is None else "has an unknown"
            raise TenantError(
                f"{str(folder)!r} {lacks} {name!r} in the generator at {block.owner!r}, so its config and weights do "
                "not match: save the adapter again."
            )
        if shape != wanted:
            raise TenantError(
                f"{str(folder)!r} has {name!r} of shape {shape} in the generator at {block.owner!r}, but the served "
                f"model needs {wanted}: the adapter belongs to another base model, or its config was changed. Serve "
                "it on its own base model, or save it again."
            )


def prompt_length(tokens: Sequence[int], end: tuple[int, ...] | None) -> int:
    """Returns the number of prompt tokens that are pooled for the vectors: all, or up to the first match of `end`."""
    if end is None:
        return len(tokens)
    width, tokens = len(end), list(tokens)
    matches = (
        start + width for start in range(len(tokens) - width + 1) if tuple(tokens[start : start + width]) == end
    )
    return next(matches, len(tokens))


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (inputs, outputs) of each linear layer of a model in transformers, by its name."""
    shapes = {}
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "weight", None), torch.Tensor):
            try:
                shapes[name] = linear_shape(module)
            except TypeError:  # not a linear layer
                continue
    return shapes
