"""`bench`: one decoding step with each method, on the user's own model."""

import copy
import random
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.progress import track
from torch import nn
from transformers import set_seed

from ..fanlora.config import FanLoraConfig
from ..fanlora.modules import ModuleName, candidates
from ..fanlora.setting import FanLoraSetting
from ..para.config import ParaConfig
from . import sources
from .output import quiet_stdout, show_json, show_table


BASE = "base model"
STEPS_A_PROMPT = 20


@dataclass
class Contestant:
    """A model that generates, a token a step for each row.

    Attributes:
        name: what the answer calls it.
        model: the model.
        call: what its calls take besides the tokens.
        parameters: the adapter's parameters, of one tenant.
    """

    name: str
    model: nn.Module
    call: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0
    tokens: Any = None
    cache: Any = None
    seconds: list[float] = field(default_factory=list)

    def begin(self, prompts: torch.Tensor) -> None:
        """Passes the prompts, and takes a step that is not timed."""
        self.tokens, self.cache = prompts, None
        self.step()
        self.step()

    def step(self) -> None:
        """Passes the last tokens and takes the likeliest next ones."""
        output = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True, **self.call)
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise ValueError(f"The {self.name} keeps no KV cache; `bench` times decoding with one.")
        self.tokens = output.logits[:, -1:].argmax(-1)

    def timed_step(self) -> None:
        """Takes a step and keeps its seconds."""
        device = self.tokens.device
        _wait(device)
        started = time.perf_counter()
        self.step()
        _wait(device)
        self.seconds.append(time.perf_counter() - started)


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
        found = sources.setting(setting) if setting else _two_a_layer(base)
        contestants, missing = _contestants(base, found, tenants, rows, r)
        _time(contestants, rounds, base.config.get_text_config().vocab_size, (rows, prompt_length))
    content: dict[str, Any] = {
        "model": model,
        "tenants": tenants,
        "batch_size": rows,
        "prompt_length": prompt_length,
        "device": device,
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "results": [_summary(contestant, contestants[0]) for contestant in contestants],
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


def _contestants(
    base: nn.Module, setting: FanLoraSetting, tenants: int, rows: int, r: int
) -> tuple[list[Contestant], dict[str, str]]:
    """Returns those that this model can have, all on the same weights in memory, and why others are missing."""
    configs: dict[str, PeftConfig] = {
        "LoRA, all linear layers": LoraConfig(r=r, target_modules="all-linear", task_type="CAUSAL_LM"),
        "FanLoRA, all linear layers": FanLoraConfig(r=r, task_type="CAUSAL_LM"),
        f"FanLoRA, {len(setting.kept)} modules": FanLoraConfig(r=r, setting=setting, task_type="CAUSAL_LM"),
        "PARA": ParaConfig(init_para_weights=False, task_type="CAUSAL_LM"),
    }
    made, missing = [Contestant(BASE, base), Contestant(f"{BASE}, again", _twin(base))], {}
    names = [f"tenant{row % tenants}" for row in range(rows)]
    for name, config in configs.items():
        try:
            model = get_peft_model(_twin(base), config, adapter_name=names[0])
            parameters = model.get_nb_trainable_parameters()[0]
            for other in sorted(set(names) - {names[0]}):
                model.add_adapter(other, copy.deepcopy(config))
        except ValueError as error:
            missing[name] = " ".join(str(error).split())
            continue
        model.requires_grad_(False)
        made.append(Contestant(name, model.eval(), {"adapter_names": names} if tenants > 1 else {}, parameters))
    return made, missing


@torch.inference_mode()
def _time(contestants: list[Contestant], rounds: int, vocabulary: int, shape: tuple[int, int]) -> None:
    """Lets each take one step a round, in random order, so that what else slows the machine slows all of them."""
    order = list(contestants)
    device = next(contestants[0].model.parameters()).device
    for number in track(range(rounds), "Timing", transient=True, console=Console(stderr=True)):
        if number % STEPS_A_PROMPT == 0:
            prompts = torch.randint(0, vocabulary, shape, device=device)
            for contestant in contestants:
                contestant.begin(prompts)
        random.shuffle(order)
        for contestant in order:
            contestant.timed_step()


def _summary(contestant: Contestant, base: Contestant) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(contestant.seconds, base.seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "method": contestant.name,
        "parameters": contestant.parameters,
        "median_ms": round(1000 * statistics.median(contestant.seconds), 2),
        "ratio": round(median, 4),
        "ratio_quartiles": [round(lower, 4), round(upper, 4)],
    }


def _two_a_layer(base: nn.Module) -> FanLoraSetting:
    """Returns a setting for timing alone: the first linear layer of each part of a block, as of attention and MLP."""
    first: dict[tuple[str, str], str] = {}
    for name in candidates(base):
        module = ModuleName.parse(name)
        first.setdefault((module.block, module.role.rpartition(".")[0]), name)
    return FanLoraSetting.from_modules(base, first.values())


def _twin(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def _quartiles(summary: dict[str, Any]) -> str:
    lower, upper = summary["ratio_quartiles"]
    return f"{lower:.2f}-{upper:.2f}"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
