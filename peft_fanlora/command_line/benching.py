"""The commands `bench` and `costs`: time a decoding step with each method, or with LoRA on some modules."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import set_seed

from ..fanlora.candidates import candidates
from ..fanlora.choices import Engine
from ..fanlora.config import FanLoraConfig
from ..fanlora.cost_measurement import module_costs
from ..fanlora.modules import ModuleName
from ..fanlora.setting import FanLoraSetting
from ..para.config import ParaConfig
from ..timing import BASE, Contestant, Stopwatch, decode_steps, summaries, twin, with_tenants
from . import sources
from .output import quiet_stdout, show_facts, show_json, show_table


def bench(
    model: str,
    setting: str | None,
    tenants: int,
    batch_size: int | None,
    prompt_length: int,
    r: int,
    rounds: int,
    device: str,
    as_json: bool,
) -> None:
    """Times the contestants in turns and prints their ratios.

    Raises:
        ValueError: the model or the setting cannot be read, or the options do not fit.
    """
    rows = batch_size or max(8, tenants)
    if rows < tenants:
        raise ValueError(f"--batch-size {rows} has no row for each of {tenants} tenants; pass at least {tenants}.")
    with quiet_stdout():
        set_seed(0)
        base = sources.causal_model(model).to(device).eval()
        found = sources.setting(setting) if setting else _two_per_layer(base)
        contestants, missing = _contestants(base, found, tenants, rows, r)
        vocabulary, place = base.config.get_text_config().vocab_size, next(base.parameters()).device
        seconds = decode_steps(
            contestants,
            track(range(rounds), "Timing", transient=True, console=Console(stderr=True)),
            lambda: torch.randint(0, vocabulary, (rows, prompt_length), device=place),
            Stopwatch(device),
        )
    content: dict[str, Any] = {
        "model": model,
        "tenants": tenants,
        "batch_size": rows,
        "prompt_length": prompt_length,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "results": [
            {**summary, "parameters": contestant.parameters}
            for contestant, summary in zip(contestants, summaries(seconds), strict=True)
        ],
        "not_available": missing,
    }
    if as_json:
        show_json(content)
        return
    columns = ["one decoding step", "parameters", "ms", "ratio", "quartiles"]
    table = [
        (one["method"], f"{one['parameters']:,}", one["median_ms"], f"{one['ratio']:.2f}", _quartiles(one))
        for one in content["results"]
    ]
    show_table(f"{model}: {tenants} tenant(s), {rows} rows, {device}", columns, table)
    for name, reason in missing.items():
        print(f"{name} is not available for this model: {reason}")


def costs(
    model: str, engine: Engine, output: Path, tenants: int, r: int, rounds: int, device: str, as_json: bool
) -> None:
    """Measures and saves the costs of a model's modules, and prints them.

    Raises:
        ValueError: the model cannot be read.
        ModuleNotFoundError: the engine is not installed.
    """
    with quiet_stdout():
        set_seed(0)
        base = sources.causal_model(model).to(device)
        found = module_costs(base, engine, r=r, tenants=tenants, rounds=rounds)
        found.save(output)
    if as_json:
        show_json(asdict(found))
        return
    facts = {
        "a step with adapters": f"{found.per_step:.2%} of the base model's step",
        "per module": f"{found.per_module:.2%}",
        "per million parameters": f"{1e6 * found.per_parameter:.2%}",
        "all modules": f"{found.slowdown(found.parameters):.3f} of the base model's step",
        "error of a predicted ratio": f"{found.error:.3f}",
        "base model's step": f"{found.conditions['base_ms']} ms",
    }
    show_facts(f"{model}: {tenants} tenant(s), rank {r}, {engine}", facts)
    print(f"Wrote {output}")


def _contestants(
    base: nn.Module, setting: FanLoraSetting, tenants: int, rows: int, r: int
) -> tuple[list[Contestant], dict[str, str]]:
    """Returns the methods that this model supports, all on the same weights, and why others are missing."""
    configs: dict[str, PeftConfig] = {
        "LoRA, all linear layers": LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"),
        "FanLoRA, all linear layers": FanLoraConfig(r=r, task_type="CAUSAL_LM"),
        f"FanLoRA, {len(setting.kept)} modules": FanLoraConfig(r=r, setting=setting, task_type="CAUSAL_LM"),
        "PARA": ParaConfig(init_para_weights=False, task_type="CAUSAL_LM"),
    }
    made, missing = [Contestant(BASE, base), Contestant(f"{BASE}, again", twin(base))], {}
    names = [f"tenant{row % tenants}" for row in range(rows)]
    for name, config in configs.items():
        try:
            model = with_tenants(twin(base), config, names[:tenants])
        except ValueError as error:
            missing[name] = " ".join(str(error).split())
            continue
        parameters = sum(
            parameter.numel() for parameter in get_peft_model_state_dict(model, adapter_name=names[0]).values()
        )
        made.append(Contestant(name, model, {"adapter_names": names} if tenants > 1 else {}, parameters))
    return made, missing


def _two_per_layer(base: nn.Module) -> FanLoraSetting:
    """Returns a setting for timing only: the first linear layer of each part of a block, such as attention and MLP."""
    first: dict[tuple[str, str], str] = {}
    for name in candidates(base):
        module = ModuleName.parse(name)
        first.setdefault((module.block, module.role.rpartition(".")[0]), name)
    return FanLoraSetting.from_modules(base, first.values())


def _quartiles(summary: dict[str, Any]) -> str:
    lower, upper = summary["ratio_quartiles"]
    return f"{lower:.2f}-{upper:.2f}"
