"""What "all-linear" means for FanLoRA: the linear layers of the blocks asked for, without those that LoRA cannot adapt."""

import re
from typing import Any

from peft import TaskType
from torch import nn

from .modules import Module, candidates


def linear_layers_in(layers: int | list[int], pattern: str | list[str] | None, model: nn.Module) -> set[str]:
    """Returns the linear layers of some blocks: what "all-linear" is to mean beside `layers_to_transform`.

    Raises:
        ValueError: the model has no linear layer in these blocks.
    """
    indices = {layers} if isinstance(layers, int) else set(layers)
    stacks = {pattern} if isinstance(pattern, str) else set(pattern or ())
    modules = map(Module.parse, candidates(model))
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
    return names


def leave_out_unfit(config: Any, model: nn.Module) -> None:
    """Takes out of "all-linear" what LoRA cannot adapt.

    That is a head which PEFT is going to train in full (PEFT itself thinks of sequence classification alone), and the
    routers of experts that are linear layers by their class, but return several tensors.
    """
    heads = {TaskType.TOKEN_CLS: ("classifier", "score"), TaskType.QUESTION_ANS: ("qa_outputs",)}
    unfit = [name for name in heads.get(config.task_type, ()) if hasattr(model, name)]
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module).__name__.endswith("Router"):
            unfit.append(name)
    if not unfit:
        return
    excluded = config.exclude_modules or []
    if isinstance(excluded, str):
        config.exclude_modules = "|".join((f"(?:{excluded})", *map(re.escape, unfit)))
    else:
        config.exclude_modules = [*excluded, *unfit]
