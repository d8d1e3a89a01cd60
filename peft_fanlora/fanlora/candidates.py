"""Finds the linear layers of a model that FanLoRA chooses among, and the LoRA layers of an adapter."""

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
    """Returns whether `module` is a linear layer: plain, quantised or with LoRA.

    Like PEFT's "all-linear", this relies on PEFT's convention that the LoRA layer of a linear layer has "Linear" in
    its class name, which quantised layers follow as well.
    """
    return isinstance(module, (nn.Linear, Conv1D)) or "Linear" in type(module).__name__


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the linear layers that FanLoRA chooses among, by name and in the model's order.

    These are the linear layers in the numbered blocks of the language model. Embeddings and heads are outside the
    blocks, and vision and audio towers are left out, since they run once per request instead of once per token. In a
    model without numbered blocks all linear layers except the output head are candidates.

    Args:
        model: the base model, with or without adapters.
    """
    towers = _prefixes_of(model, _towers(model))
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    linear: dict[str, nn.Module] = {}
    inside = None  # the current linear layer, whose LoRA submodules are not candidates
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
    """Returns the candidates that have the adapter, by name and in the model's order."""
    return {
        name: module
        for name, module in candidates(model).items()
        if isinstance(module, LoraLayer) and adapter_name in module.lora_A
    }


def lora_factors(layer: Any, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the weights A and B of a LoRA layer's adapter, of shapes (r, in) and (out, r)."""
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Returns all LoRA layers that have the adapter, candidates or not, by name and in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module._all_available_adapter_names()
    }


def adapted_modules_of(model: nn.Module, adapter_name: str) -> set[str]:
    """Returns the names of the modules that have the adapter; its `target_parameters` are not modules."""
    layers = adapted_layers(model, adapter_name)
    return {name for name, layer in layers.items() if not isinstance(layer, ParamWrapper)}


def exact_names(names: Iterable[str], model: nn.Module) -> set[str] | str:
    """Returns a `target_modules` that matches the modules with these names and no others.

    This is the set of names, or a regular expression if another module's name ends in one of them: PEFT would also
    adapt `draft.layers.0.q_proj` for the name `layers.0.q_proj`.
    """
    exact = set(names)
    for name, _ in model.named_modules():
        parts = name.split(".")
        if name not in exact and any(".".join(parts[start:]) in exact for start in range(1, len(parts))):
            return "|".join(map(re.escape, sorted(exact)))
    return exact


def num_layers(model: nn.Module, modules: Iterable[ModuleName]) -> dict[str, int]:
    """Returns the number of blocks of each stack of the modules in `model`, adapted or not."""
    stacks = dict.fromkeys(module.stack for module in modules)
    return {stack: len(list(model.get_submodule(stack).children())) if stack else 1 for stack in stacks}


def counterpart(stack: str, available: Iterable[str], model: nn.Module) -> str:
    """Returns the stack of a model that corresponds to `stack`.

    It has the same name, or the same name except for the prefix of a head or wrapper, or that name within a larger
    model. A matching suffix alone is not enough: the layers of `draft.layers` are not those of `layers`.
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
    """Returns the name of a stack in the bare model, without a head or a wrapper."""
    outer = {"base_model", "model", "module", "_orig_mod", "pretrained_model", getattr(model, "base_model_prefix", "")}
    parts = stack.split(".")
    while len(parts) > 1 and parts[0] in outer:
        parts = parts[1:]
    return ".".join(parts)


def num_parameters_per_rank(module: Any) -> int:
    """Returns the number of parameters per rank of LoRA on a linear layer: in_features + out_features."""
    if hasattr(module, "in_features"):
        return module.in_features + module.out_features
    return module.nx + module.nf  # Conv1D


def model_type(model: nn.Module) -> str | None:
    """Returns the model type of a transformers model, such as "llama"; None for other models."""
    return getattr(getattr(model, "config", None), "model_type", None)


def _towers(model: nn.Module) -> list[nn.Module]:
    """Returns the vision and audio encoders of a multimodal model."""
    if not isinstance(model, PreTrainedModel):
        return []
    towers = [model.get_encoder(modality=modality) for modality in ("image", "audio")]
    language = model.get_decoder()
    return [tower for tower in towers if tower not in (model, model.base_model, language)]


def _of_language_model(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns the names that are in the language model of a multimodal model; all names for other models.

    Towers and connectors have a configuration class of their own, or that of the whole model if the language model has
    its own. If no separate language model is found, the whole model is the language model.
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
