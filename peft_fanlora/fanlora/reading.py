"""Verifies an exported adapter by loading it with PEFT's LoRA, without this package's classes."""

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, load_peft_weights, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .candidates import adapted_layers, is_linear, lora_factors


def read_back(folder: str, model: nn.Module, adapter_name: str) -> None:
    """Loads an exported adapter with PEFT's LoRA, and compares it with the original adapter.

    It is loaded into modules of the same names, whose weights take no memory.

    Args:
        folder: the folder of the export.
        model: the base model with the adapter.
        adapter_name: the adapter's name.

    Raises:
        RuntimeError: the two differ.
    """
    with warnings.catch_warnings(), torch.random.fork_rng(devices=()):
        warnings.simplefilter("ignore")  # PEFT warns about a model that is not from transformers
        plain = PeftModel(_hollow(model, adapter_name, {}), LoraConfig.from_pretrained(folder))
        loaded: Any = set_peft_model_state_dict(plain, load_peft_weights(folder, device="cpu"))
    base: Any = plain.get_base_model()
    layers, found = adapted_layers(model, adapter_name), adapted_layers(base, "default")
    strange = sorted(loaded.unexpected_keys) or sorted(layers.keys() ^ found.keys())
    strange += [name for name in layers if name in found and not _is_same(layers[name], adapter_name, found[name])]
    for name, module in _trained_whole(model, adapter_name).items():
        wrapper: Any = base.get_submodule(name)
        read = wrapper.modules_to_save["default"].state_dict()
        strange += [
            f"{name}.{key}" for key, value in module.state_dict().items() if not torch.equal(value.cpu(), read[key])
        ]
    if strange:
        raise RuntimeError(
            f"PEFT's LoRA loads an adapter from the export that differs from {adapter_name!r} in {strange[0]!r}, so "
            "nothing was exported. Save the adapter with save_pretrained, and report this with its configuration."
        )


def _trained_whole(model: nn.Module, adapter_name: str) -> dict[str, nn.Module]:
    """Returns the copies of modules that an adapter trains in full, by module name."""
    return {
        name: module.modules_to_save[adapter_name]
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save
    }


def _hollow(module: Any, adapter_name: str, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Returns modules of the same names, with linear layers of the same shapes whose weights are a single number.

    Args:
        module: the module to imitate.
        adapter_name: the adapter whose copies of modules are used.
        made: the results for other modules, so that a shared module stays shared.
    """
    if module in made:
        return made[module]
    if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
        hollow: Any = copy.deepcopy(module.modules_to_save[adapter_name])
    elif isinstance(module, AuxiliaryTrainingWrapper):
        hollow = _hollow(module.original_module, adapter_name, made)
    elif isinstance(module, LoraLayer):
        hollow = _hollow(module.get_base_layer(), adapter_name, made)
    elif isinstance(module, Conv1D):
        hollow = Conv1D(1, 1)
        hollow.nf, hollow.nx = module.nf, module.nx
        hollow.weight = nn.Parameter(torch.zeros(()).expand(module.nx, module.nf), requires_grad=False)
    elif is_linear(module) and hasattr(module, "in_features"):
        hollow = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
        hollow.weight = nn.Parameter(torch.zeros(()).expand(hollow.weight.shape), requires_grad=False)
    else:
        hollow = nn.Module()
        for name, child in module.named_children():
            hollow.add_module(name, _hollow(child, adapter_name, made))
    made[module] = hollow
    return hollow


def _is_same(layer: Any, adapter_name: str, other: Any) -> bool:
    """Returns whether two LoRA layers have the same ΔW, up to the rounding of the adapter's dtype."""
    A, B = (factor.detach().double().cpu() for factor in lora_factors(layer, adapter_name))
    A2, B2 = (factor.detach().double().cpu() for factor in lora_factors(other, "default"))
    B, B2 = B * layer.scaling[adapter_name], B2 * other.scaling["default"]
    if A.shape[1] != A2.shape[1] or B.shape[0] != B2.shape[0]:
        return False
    rounding = max(torch.finfo(layer.lora_B[adapter_name].weight.dtype).eps, 1e-7)
    return bool(_norm(torch.cat([A, A2]), torch.cat([B, -B2], dim=1)) <= 4 * rounding * _norm(A, B))


def _norm(A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt()
