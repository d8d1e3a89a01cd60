"""Determines the modules that a configuration adapts, for "all-linear" and for a setting."""

import re
from copy import copy
from typing import Any

from peft import PeftType, TaskType
from peft.tuners.lora import LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from .candidates import candidates, exact_names
from .modules import ModuleName
from .setting import FanLoraSetting


def find_targets(tuner: LoraModel, config: Any, model: nn.Module) -> set[str] | str | None:
    """Sets the modules that a configuration adapts.

    Args:
        tuner: the tuner that will adapt them.
        config: the configuration; its `setting`, if there is one, is resolved.
        model: the model.

    Returns:
        The `target_modules` of an adapter with a setting; None for other configurations.

    Raises:
        ValueError: the setting does not fit the model or contradicts `target_modules`, or the model has no linear
            layer in the blocks of `layers_to_transform`.
    """
    if isinstance(config.setting, FanLoraSetting):
        setting = config.setting.resolve(model)
        targets = _exact_targets(tuner, config, model, setting)
        config.target_modules, config.setting = targets, setting
        return targets
    if str(config.target_modules).lower() == "all-linear":
        if config.layers_to_transform not in (None, []):
            _name_linear_layers(config, model)
        _exclude_unsupported(config, model)
    else:
        _follow_renamed_targets(config, model)
    return None


def _name_linear_layers(config: Any, model: nn.Module) -> None:
    """Sets the linear layers of the blocks in `layers_to_transform` as the targets for "all-linear".

    Raises:
        ValueError: the model has no linear layer in these blocks.
    """
    layers, pattern = config.layers_to_transform, config.layers_pattern
    indices = {layers} if isinstance(layers, int) else set(layers)
    stacks = {pattern} if isinstance(pattern, str) else set(pattern or ())
    modules = map(ModuleName.parse, candidates(model))
    names = {
        module.name
        for module in modules
        if module.layer in indices and (not stacks or module.stack.rpartition(".")[2] in stacks)
    }
    if not names:
        raise ValueError(
            f"layers_to_transform={layers!r} (layers_pattern={pattern!r}) leaves no linear layer of this model: pass "
            "indices of its blocks, counted from 0."
        )
    config.target_modules = exact_names(names, model)
    if isinstance(config.target_modules, str):  # a regular expression, which already includes the layers
        config.layers_to_transform = config.layers_pattern = None


def _exclude_unsupported(config: Any, model: nn.Module) -> None:
    """Excludes from "all-linear" what LoRA cannot adapt.

    This is a head that PEFT will train in full (PEFT itself only handles sequence classification), and routers of
    experts that are linear layers by class but return several tensors.
    """
    heads = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
    unfit = [name for name in heads.get(config.task_type, ()) if hasattr(model, name)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
            unfit.append(name)
    if not unfit:
        return
    excluded, exact = config.exclude_modules or [], exact_names(unfit, model)
    if isinstance(excluded, str) or isinstance(exact, str):
        if not isinstance(excluded, str):
            excluded = rf"(.*\.)?({'|'.join(map(re.escape, excluded)) or '(?!)'})"
        config.exclude_modules = "|".join((f"(?:{excluded})", *map(re.escape, unfit)))
    else:
        config.exclude_modules = [*excluded, *unfit]


def _exact_targets(tuner: LoraModel, config: Any, model: nn.Module, setting: FanLoraSetting) -> set[str] | str:
    """Returns the `target_modules` for a setting: its modules, and those adapted in addition to the candidates.

    Raises:
        ValueError: the setting contradicts the configuration's `target_modules`.
    """
    targets = config.target_modules
    if str(targets).lower() == "all-linear":
        return exact_names(setting.names, model)
    if not isinstance(targets, str) and set(targets) <= {name for name, _ in model.named_modules()}:
        targets = exact_names(targets, model)  # saved configurations have full names
    exact = copy(config)
    exact.target_modules = targets
    targeted = {name for name in candidates(model) if tuner._check_target_module_exists(exact, name)}
    if chosen := sorted(targeted ^ set(setting.names)):
        raise ValueError(
            f"`target_modules` and `setting` disagree, for instance about {chosen[0]!r}, but a setting already "
            "defines which modules are adapted. Pass only one of the two."
        )
    return targets


def _follow_renamed_targets(config: Any, model: nn.Module) -> None:
    """Converts targets of an older version of the architecture to the current names, as PEFT does for LORA.

    Nothing is converted if every target exists: current names could be mistaken for older ones.
    """
    names = [name for name, _ in model.named_modules()]
    targets = config.target_modules or ()
    if isinstance(targets, str):
        found = any(re.fullmatch(targets, name) for name in names)
    else:
        ends = {
            ".".join(parts[start:]) for parts in (name.split(".") for name in names) for start in range(len(parts))
        }
        found = set(targets) <= ends
    if not found:
        peft_type, config.peft_type = config.peft_type, PeftType.LORA
        try:
            convert_peft_config_for_transformers(config, model, conversions=None)
        finally:
            config.peft_type = peft_type
