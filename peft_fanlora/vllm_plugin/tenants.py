"""Reads and checks the folders of PARA adapters, as `save_pretrained` writes them; needs no vLLM."""

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
    """A folder that cannot be served."""


@dataclass(frozen=True)
class TenantConfig:
    """What a PARA adapter's configuration says about its generators.

    Attributes:
        r: the width of the bottleneck.
        pooling: one of `POOLINGS`.
        activation: the name of the activation.
        prompt_end: the token ids with which prompts end, if the adapter was trained to look for them.
    """

    r: int
    pooling: str
    activation: str
    prompt_end: tuple[int, ...] | None = None


@dataclass(frozen=True)
class SavedBlock:
    """The generator of one Transformer block as it was saved.

    Attributes:
        owner: the name of the module that holds the generator.
        prefix: the block's name with a dot at the end, or "" for a module outside of any block.
        parts: the generator's parameters by their names in it; tensors, or their shapes.
    """

    owner: str
    prefix: str
    parts: dict[str, Any]

    @property
    def ups(self) -> dict[str, Any]:
        """The up-projections by the name of their target."""
        return {name.removeprefix(UP): part for name, part in self.parts.items() if name.startswith(UP)}


def peft_type_of(folder: str | Path) -> str:
    """Returns the method of a saved adapter, such as "PARA" or "LORA".

    Raises:
        TenantError: the folder holds no readable configuration of an adapter.
    """
    return str(read_json(folder).get("peft_type"))


def read_json(folder: str | Path) -> dict[str, Any]:
    """Returns what an adapter's configuration file says.

    Raises:
        TenantError: there is no such file, or it cannot be read.
    """
    folder = Path(folder)
    file = folder / CONFIG_NAME
    if not folder.is_dir():
        raise TenantError(
            f"The adapter folder {str(folder)!r} does not exist: pass the folder that save_pretrained made."
        )
    if not file.exists():
        raise TenantError(
            f"{str(folder)!r} has no {CONFIG_NAME}, so it is no adapter's folder: pass the one that save_pretrained made."
        )
    try:
        content = reading.read_json(file)
    except (OSError, ValueError) as error:
        raise TenantError(f"{str(file)!r} cannot be read ({error}): save the adapter again.") from error
    if not isinstance(content, dict):
        raise TenantError(f"{str(file)!r} holds {type(content).__name__}, not an object: save the adapter again.")
    return content


def read_config(folder: str | Path) -> TenantConfig:
    """Returns the configuration of a PARA adapter.

    Raises:
        TenantError: it is another method's, it has a value that PARA does not know, or something that an engine cannot
            serve.
    """
    content = read_json(folder)
    where = str(Path(folder) / CONFIG_NAME)
    if content.get("peft_type") != "PARA":
        raise TenantError(f"{where!r} is of the method {content.get('peft_type')!r}, not of PARA.")
    for name, what in (("modules_to_save", "modules"), ("trainable_token_indices", "embeddings")):
        if content.get(name):
            raise TenantError(
                f"{where!r} has {name}={content[name]!r}: vLLM has one copy of these {what} for all requests. Train without "
                f"{name}, or serve this adapter with transformers."
            )
    r, pooling, activation = content.get("r"), content.get("pooling"), content.get("activation")
    end = content.get("prompt_end_token_ids")
    if not isinstance(r, int) or not _is_count(r) or r < 1:
        raise TenantError(f"{where!r} has r={r!r}, which is no whole number of at least 1: save the adapter again.")
    if pooling not in POOLINGS:
        raise TenantError(
            f"{where!r} has pooling={pooling!r}, and this version knows {', '.join(POOLINGS)}: update it."
        )
    if not isinstance(activation, str) or not is_activation(activation):
        raise TenantError(f"{where!r} has activation={activation!r}, which the installed transformers does not know.")
    if end is not None and (not isinstance(end, list) or not end or not all(map(_is_count, end))):
        raise TenantError(f"{where!r} has prompt_end_token_ids={end!r}, which is no list of token ids.")
    return TenantConfig(r, pooling, activation, None if end is None else tuple(end))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def read_blocks(folder: str | Path, shapes_only: bool = False) -> list[SavedBlock]:
    """Returns the saved generators, block by block.

    Args:
        folder: the adapter's folder.
        shapes_only: whether to read the shapes rather than the tensors, which takes the head of the file alone.

    Raises:
        TenantError: the file is missing, incomplete, or holds something that is no part of a generator.
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
                        f"{str(file)!r} holds {key!r}, which is no part of a PARA generator, such as a module or an "
                        "embedding that was trained whole: vLLM has one copy of those for all requests."
                    )
                block = blocks.setdefault(owner, SavedBlock(owner, _block_prefix(owner), {}))
                value = tuple(tensors.get_slice(key).get_shape()) if shapes_only else tensors.get_tensor(key)
                block.parts[part] = value
    except (OSError, SafetensorError) as error:
        raise TenantError(
            f"{str(file)!r} cannot be read ({error}): it is damaged or half written; save it again."
        ) from error
    if not blocks:
        raise TenantError(f"{str(file)!r} holds no generator: save the adapter again.")
    return list(blocks.values())


def _block_prefix(module: str) -> str:
    """Returns the name of the block that a module belongs to, with a dot: up to the first number in the module's name."""
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
    """Checks saved generators, given as shapes, against the linear layers of a model.

    Args:
        blocks: the generators, from `read_blocks` with `shapes_only`.
        config: the adapter's configuration.
        shapes: the (inputs, outputs) of each linear layer of the model by its name.
        model_config: the model's configuration in transformers.
        folder: where the adapter is, for messages.
        rename: returns the name in `shapes` of a module as transformers names it.

    Returns:
        For each block, the module that each of its targets is: target name -> module name.

    Raises:
        TenantError: they do not belong to this model.
    """
    activation = {name: tuple(value.shape) for name, value in make_activation(config.activation).state_dict().items()}
    found = []
    for block in blocks:
        owner, prefix = rename(block.owner), rename(block.prefix)
        if owner not in shapes:
            raise TenantError(
                f"{str(folder)!r} has a generator at {block.owner!r}, where the served model has no linear layer that "
                "can be scaled: the adapter is of another base model, or its target_modules name layers that vLLM "
                "does not compute as one, such as experts or compressed attention."
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
                    f"{str(folder)!r} scales {module!r}, whose fused outputs vLLM holds in another order: serve this "
                    "adapter with transformers."
                )
            expected[UP + target] = (scaled.num_scaled, config.r)
        _compare(block, expected, folder)
        found.append(targets)
    return found


def _is_contiguous(sections: Sequence[tuple[int, bool]]) -> bool:
    """Whether a projection is whole, or Q, K and V, or gate and up, one after the other."""
    return len(sections) <= 3


def _targets(
    block: SavedBlock, owner: str, prefix: str, shapes: Mapping[str, tuple[int, int]], folder: str | Path
) -> dict[str, str]:
    """Returns the module of each target; targets have their module's name inside the block, without dots."""
    modules = [name for name in shapes if name.startswith(prefix)] if prefix else [owner]
    by_target = {name.removeprefix(prefix).replace(".", "_"): name for name in modules}
    targets = {}
    for target in block.ups:
        if target not in by_target:
            raise TenantError(
                f"{str(folder)!r} scales {target!r} in {block.prefix or block.owner!r}, which is no linear layer of the "
                "served model: the adapter is of another base model, or that layer cannot be served."
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
                f"{str(folder)!r} {lacks} {name!r} in the generator at {block.owner!r}: its files do not belong together; "
                "save the adapter again."
            )
        if shape != wanted:
            raise TenantError(
                f"{str(folder)!r} has {name!r} of the shape {shape} in the generator at {block.owner!r}, where the served "
                f"model needs {wanted}: the adapter is of another base model."
            )


def prompt_length(tokens: Sequence[int], end: tuple[int, ...] | None) -> int:
    """Returns how many of a request's prompt tokens make its vectors: all, or up to the first match of `end`."""
    if end is None:
        return len(tokens)
    width, tokens = len(end), list(tokens)
    matches = (
        start + width for start in range(len(tokens) - width + 1) if tuple(tokens[start : start + width]) == end
    )
    return next(matches, len(tokens))


def linear_shapes(model: torch.nn.Module) -> dict[str, tuple[int, int]]:
    """Returns the (inputs, outputs) of the linear layers of a model of transformers by their names."""
    shapes = {}
    for name, module in model.named_modules():
        if name and isinstance(getattr(module, "weight", None), torch.Tensor):
            try:
                shapes[name] = linear_shape(module)
            except TypeError:  # not a linear layer
                continue
    return shapes
