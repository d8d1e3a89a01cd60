"""The methods that the serving benchmarks compare, each as a model with non-zero adapters."""

import copy
from collections.abc import Callable

import peft
import torch
from peft import IA3Config, LoraConfig, PeftModel
from torch import nn

from peft_fanlora import FanLoraConfig, ParaConfig
from peft_fanlora.timing import BASE, Contestant, twin, with_tenants


RANK = 8
TWO_ROLES = ["v_proj", "up_proj"]
"""One attention module and one feed-forward module per layer, the same for LoRA and FanLoRA."""


def _lora(**kwargs: object) -> LoraConfig:
    return LoraConfig(r=RANK, task_type="CAUSAL_LM", **kwargs)


def _fanlora(**kwargs: object) -> FanLoraConfig:
    return FanLoraConfig(r=RANK, task_type="CAUSAL_LM", **kwargs)


_ONE_TENANT: dict[str, Callable[[], peft.PeftConfig]] = {
    "LoRA, merged": lambda: _lora(target_modules="all-linear"),
    "PEFT IA3 on Q, V, U": lambda: IA3Config(
        target_modules=["q_proj", "v_proj", "up_proj"],
        feedforward_modules=[],
        init_ia3_weights=False,
        task_type="CAUSAL_LM",
    ),
}
_MANY_TENANTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "PEFT LoRA, 7 roles": lambda: _lora(target_modules="all-linear"),
    "PEFT LoRA, 2 roles": lambda: _lora(target_modules=TWO_ROLES),
    "FanLoRA, all modules": lambda: _fanlora(),
    "FanLoRA, 2 per layer": lambda: _fanlora(target_modules=TWO_ROLES),
    "PARA": lambda: ParaConfig(task_type="CAUSAL_LM"),
}


def names(num_tenants: int) -> list[str]:
    """Returns the contestants for a number of tenants. The base model is included twice, to measure the noise."""
    return [BASE, f"{BASE}, again", *(_ONE_TENANT if num_tenants == 1 else {}), *_MANY_TENANTS]


def make(name: str, base: nn.Module, num_tenants: int, batch_size: int) -> Contestant:
    """Returns a contestant. It shares the base weights, except for merged LoRA, which needs a copy."""
    if name == BASE:
        return Contestant(name, base)
    if name.startswith(BASE):
        return Contestant(name, twin(base))
    if name == "LoRA, merged":
        model = _with_adapters(copy.deepcopy(base), _ONE_TENANT[name], 1).merge_and_unload()
        return Contestant(name, model.eval())
    model = _with_adapters(twin(base), {**_ONE_TENANT, **_MANY_TENANTS}[name], num_tenants)
    rows = [f"tenant{row % num_tenants}" for row in range(batch_size)]
    return Contestant(name, model, {} if num_tenants == 1 else {"adapter_names": rows})


def _with_adapters(base: nn.Module, make_config: Callable[[], peft.PeftConfig], count: int) -> PeftModel:
    """Returns the model with random frozen adapters, in its dtype."""
    with base.device:  # where the adapters are initialized
        model = with_tenants(base, make_config(), [f"tenant{tenant}" for tenant in range(count)])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.data = parameter.data.to(base.dtype)  # PEFT makes adapters of a bfloat16 model in float32
            if "lora_B" in name or name.rpartition(".")[2].startswith("up_"):
                nn.init.normal_(parameter, std=0.02)
    return model
