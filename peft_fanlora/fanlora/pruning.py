"""Removes LoRA from the modules of a model."""

import copy
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils import CONFIG_NAME, _get_submodules

from .candidates import adapted_modules_of, exact_names, lora_modules
from .gates import InitialFactors
from .scoring import scorable_modules, usable_adapter
from .setting import FanLoraSetting


def prune(
    tuner: LoraModel,
    setting: FanLoraSetting,
    adapter_name: str | None,
    initial_factors: Mapping[str, dict[str, InitialFactors]],
) -> FanLoraSetting:
    """Removes an adapter from every module that a setting does not keep, see `FanLoraModel.prune_modules`.

    Args:
        tuner: the model with its LoRA layers.
        setting: the modules to keep.
        adapter_name: the adapter; None for the active one.
        initial_factors: for each adapter, the factors that its initialisation subtracted from base weights. Those of
            removed modules are deleted.
    """
    adapter_name = usable_adapter(tuner, adapter_name)
    layers = scorable_modules(tuner.model, adapter_name)
    setting = setting.resolve(tuner.model)
    missing = [name for name in setting.names if name not in layers]
    if missing:
        raise ValueError(
            f"The setting keeps {missing[0]!r}, which adapter {adapter_name!r} does not adapt (any more); "
            f"it has {len(layers)} modules. Score this adapter, or make a new one with FanLoraConfig(setting=...)."
        )
    initial = initial_factors.get(adapter_name, {})
    dropped = [name for name in layers if name not in set(setting.names)]
    for name in dropped:
        base_layer: Any = layers[name].get_base_layer()
        if name in initial and not base_layer.weight.is_floating_point():
            raise ValueError(
                f"The initialisation of adapter {adapter_name!r} changed the quantised weight of {name!r}, which "
                "cannot be undone exactly. Use init_lora_weights=True on quantised models that will be pruned."
            )
    for name in dropped:
        if name in initial:
            restore_base_weight(layers[name], adapter_name, initial.pop(name))
        remove_adapter(tuner, name, layers[name], adapter_name)
    rewrite_targets(tuner, adapter_name, setting)
    return setting


def remove_adapter(tuner: LoraModel, name: str, layer: LoraLayer, adapter_name: str) -> None:
    """Deletes an adapter from a layer, and replaces the layer by its base layer if no adapter remains."""
    # If the deleted adapter is active, PEFT would activate another one on this layer only.
    active = layer._active_adapter
    layer._active_adapter = []
    layer.delete_adapter(adapter_name)
    layer._active_adapter = active
    if not layer._all_available_adapter_names():
        parent, target, target_name = _get_submodules(tuner.model, name)
        tuner._replace_module(parent, target_name, layer.base_layer, target)


def restore_base_weight(layer: Any, adapter_name: str, initial: InitialFactors) -> None:
    """Adds to a base weight the factors that an initialisation such as PiSSA's subtracted from it."""
    weight = layer.get_base_weight()
    A, B = (factor.to(weight.device, torch.float32) for factor in initial)
    delta = layer.scaling[adapter_name] * (B @ A)
    layer.set_base_weight((weight.float() + (delta.T if layer.fan_in_fan_out else delta)).to(weight.dtype))


def rewrite_targets(tuner: LoraModel, adapter_name: str, setting: FanLoraSetting) -> None:
    """Sets `target_modules` to exactly the remaining modules, so that the adapter can be saved and loaded.

    The adapter gets its own copy of the configuration, since others may share it, such as TRL's reference policy.
    """
    names = adapted_modules_of(tuner.model, adapter_name)
    config: Any = copy.deepcopy(tuner.peft_config[adapter_name])
    tuner.peft_config[adapter_name] = config
    config.target_modules = exact_names(names, tuner.model)
    config.setting = setting
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for pattern in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in pattern if not any(re.match(rf"(.*\.)?({key})$", name) for name in names)]:
            del pattern[key]
    adapted = {name for name, module in tuner.model.named_modules() if isinstance(module, LoraLayer)}
    tuner.targeted_module_names = [name for name in tuner.targeted_module_names if name in adapted]


def prune_as_saved(tuner: Any, adapter_name: str, model_id: Any, download_kwargs: dict[str, Any]) -> None:
    """Prunes an adapter to the setting of the saved adapter that will be loaded into it.

    A trainer resumes by loading a checkpoint into the new adapter of the script, which has all modules. If the
    checkpoint was saved after pruning, the other modules would remain in the model untrained.
    """
    folder = Path(model_id, download_kwargs.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        return
    setting = getattr(PeftConfig.from_pretrained(str(model_id), **download_kwargs), "setting", None)
    modules = lora_modules(tuner.model, adapter_name)
    if setting is not None and set(setting.resolve(tuner.model).names) != modules.keys():
        warnings.warn(
            f"{model_id} was saved after pruning, with {len(setting.kept)} of the {len(modules)} modules of adapter "
            f"{adapter_name!r}: the adapter is pruned to these modules.",
            stacklevel=4,
        )
        tuner.prune_modules(setting, adapter_name=adapter_name)
