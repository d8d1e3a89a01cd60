"""What a model offers: the linear layers that FanLoRA chooses among, and the LoRA layers that an adapter has on them."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .modules import ModuleName


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear layer, bare, quantised or with LoRA.

    Like PEFT's own "all-linear", this goes by PEFT's convention that the LoRA layer of any linear layer has "Linear"
    in the name of its class; the quantised layers themselves follow it as well.
    """
    return isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers that FanLoRA chooses among, by name and in the model's order.

    These are the linear layers in the numbered blocks of the language model. Embeddings and heads stand outside the
    blocks; the towers that read images or sound run once per request and not once per token, so they are left alone. In a
    model without numbered blocks all linear layers but the output head are candidates.

    Args:
        model: the base model, with adapters or without.
    """
    towers = _prefixes_of(model, _towers(model))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear: dict[str, nn.Module] = {}
    inside = None  # the linear layer that the walk is in: what LoRA keeps below its layer is no candidate
    for name, module in model.named_modules():
        if inside is not None and name.startswith(inside):
            continue
        if is_linear(module):
            inside = f"{name}."
            if module is not head and not name.startswith(towers):
                linear[name] = module
    in_blocks = {name: module for name, module in linear.items() if ModuleName.parse(name).stack}
    return {name: in_blocks[name] for name in _of_language_model(model, in_blocks)} or linear


def lora_modules(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Returns those candidates that carry the adapter, by name and in the model's order."""
    return {
        name: module
        for name, module in candidates(model).items()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def lora_factors(layer: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights A and B of a LoRA layer's adapter, of shapes (r, in) and (out, r)."""
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Returns all LoRA layers that carry the adapter, candidates or not, by name and in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module._all_available_adapter_names()
    }


def adapted_modules_of(model: nn.Module, adapter_name: str) -> set[str]:
    """Returns the names of the modules that carry the adapter; its `target_parameters` are not modules."""
    layers = adapted_layers(model, adapter_name)
    return {name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}


def exact_names(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """Returns a `target_modules` that adapts the modules of these names and no others.

    That is the names, or a regular expression where another module of the model ends in one of them: PEFT would adapt
    `draft.layers.0.q_proj` for the name `layers.0.q_proj` as well.
    """
    exact = set(names)
    for name, _ in model.named_modules():
        parts = name.split(".")
        if name not in exact and any(".".join(parts[start:]) in exact for start in range(1, len(parts))):
            return "|".join(map(re.escape, sorted(exact)))
    return exact


def num_layers(model: nn.Module, modules: Iterable[ModuleName]) -> dict[str, int]:
    """Returns how many blocks each of the modules' stacks has in `model`, adapted or not."""
    stacks = dict.fromkeys(module.stack for module in modules)
    return {stack: len(list(model.get_submodule(stack).children())) if stack else 1 for stack in stacks}


def counterpart(stack: str, available: Iterable[str], model: nn.Module) -> str:
    """Returns the one stack of a model that stands for `stack`.

    It has the same name, or the same but for what a head or a wrapper puts in front, or that name in a larger model.
    That a name ends in another is not enough: the layers of `draft.layers` are not those of `layers`.
    """
    found = (
        [other for other in available if other == stack]
        or [other for other in available if _unwrapped(other, model) == _unwrapped(stack, model)]
        or [other for other in available if stack and other.endswith(f".{stack}")]
    )
    if len(found) != 1:
        raise ValueError(
            f"The setting has modules in {stack!r}, but the model's blocks are in {sorted(available)}: "
            "the setting belongs to another architecture."
        )
    return found[0]


def _unwrapped(stack: str, model: nn.Module) -> str:
    """Returns the name of a stack as the bare model has it, without a head or a wrapper."""
    outer = {"base_model", "model", "module", "_orig_mod", "pretrained_model", getattr(model, "base_model_prefix", "")}
    parts = stack.split(".")
    while len(parts) > 1 and parts[0] in outer:
        parts = parts[1:]
    return ".".join(parts)


def num_parameters_per_rank(module: Any) -> int:
    """Returns what one rank of LoRA costs on a linear layer: its number of input features plus that of its outputs."""
    if hasattr(module, "in_features"):
        return module.in_features + module.out_features
    return sum(module.weight.shape)  # Conv1D


def model_type(model: nn.Module) -> str | None:
    """Returns the family of a transformers model, such as "llama", and None for any other."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _towers(model: nn.Module) -> list[nn.Module]:
    """Returns the encoders of other modalities that stand beside a language model."""
    if not isinstance(model, PreTrainedModel):
        return []
    towers = [model.get_encoder(modality=modality) for modality in ("image", "audio")]
    language = model.get_decoder()
    return [tower for tower in towers if tower not in (model, model.base_model, language)]


def _of_language_model(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns those names that lie in the language model of a multimodal one, and all names for any other model.

    A tower or a connector is a model with a configuration of its own class, or belongs to the whole beside a language
    model that is one. Where no such language model is found, the whole is the language model.
    """
    names = list(names)
    if not isinstance(model, PreTrainedModel) or set(_listed(model.input_modalities)) <= {"text"}:
        return names
    configs = {name: type(part.config) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    whole = type(model.config)
    text = {type(model.config.get_text_config(**which)) for which in ({}, {"decoder": True})} - {whole}
    owners = {}
    for name in names:
        parts = name.split(".")
        outer = (".".join(parts[:length]) for length in range(len(parts), -1, -1))
        owners[name] = next(configs[prefix] for prefix in outer if prefix in configs)
    for language in (text, {whole}):
        if found := [name for name in names if owners[name] in language]:
            return found
    return names


def _listed(modalities: str | Iterable[str]) -> list[str]:
    return [modalities] if isinstance(modalities, str) else list(modalities)


def _prefixes_of(model: nn.Module, parts: list[nn.Module]) -> tuple[str, ...]:
    return tuple(f"{name}." for name, module in model.named_modules() if any(module is part for part in parts))
