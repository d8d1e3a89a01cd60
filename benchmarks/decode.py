"""Times one decoding step of a real model: without an adapter, with PARA for 1, 8 and 32 tenants, with PEFT's LoRA.

The variants take turns within each round, in random order, each on a KV cache of its own, so that whatever else slows
the machine slows all of them. Each step's time is divided by the base model's in the same round; the median ratio and
its quartiles are what to compare. The base model taken a second time shows how far equal things differ.

    python benchmarks/decode.py --rounds 60 --output benchmarks/results/decode-cpu.json
"""

import copy
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import machine
import peft
import torch
import transformers
import typer
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, set_seed

from peft_fanlora import ParaConfig


sys.path.append(str(Path(__file__).parent.parent / "examples"))
import assets


BATCH_SIZE = 8
PROMPT_LENGTH = 64
BASE = "base model"


@dataclass
class Variant:
    """A model with its running generation."""

    name: str
    model: nn.Module
    adapter_names: list[str] | None = None
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None
    seconds: list[float] = field(default_factory=list)

    def prefill(self, prompt: torch.Tensor) -> None:
        """Starts over from a prompt."""
        self.cache = None
        self._call(prompt)

    def step(self, synchronise: Callable[[], None]) -> float:
        """Generates one token for each row and returns the seconds that it took."""
        synchronise()
        started = time.perf_counter()
        self._call(self.tokens)
        synchronise()
        return time.perf_counter() - started

    def _call(self, tokens: torch.Tensor) -> None:
        names = {} if self.adapter_names is None else {"adapter_names": self.adapter_names}
        out = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **names)
        self.cache = out.past_key_values
        self.tokens = out.logits[:, -1:].argmax(-1)


def twin_of(base: nn.Module) -> nn.Module:
    """Returns a copy with the same weights in the same memory, whose placement alone can make some percent."""
    return copy.deepcopy(base, {id(parameter): parameter for parameter in base.parameters()})


def with_adapters(base: nn.Module, make: Callable[[], peft.PeftConfig], count: int) -> PeftModel:
    """Puts `count` adapters on a copy of the base model, with weights that change what it computes."""
    model = get_peft_model(twin_of(base), make(), adapter_name="tenant0")
    for tenant in range(1, count):
        model.add_adapter(f"tenant{tenant}", make())
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model.eval()


def variants_of(base: nn.Module) -> list[Variant]:
    def para() -> ParaConfig:
        return ParaConfig(init_para_weights=False, task_type="CAUSAL_LM")

    def lora() -> LoraConfig:
        return LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")

    few, many = with_adapters(base, para, 1), with_adapters(base, para, 32)
    eight = [f"tenant{row}" for row in range(BATCH_SIZE)]
    spread = [f"tenant{row * 4 + 3}" for row in range(BATCH_SIZE)]
    lora_tenants = with_adapters(base, lora, BATCH_SIZE)
    return [
        Variant(BASE, base),
        Variant("base model, a second time", twin_of(base)),
        Variant("PARA, 1 tenant", few),
        Variant("PARA, 8 tenants", many, eight),
        Variant("PARA, 8 of 32 loaded tenants", many, spread),
        Variant("LoRA r=8 on all linear layers, 1 tenant", with_adapters(base, lora, 1)),
        Variant("LoRA r=8 on all linear layers, 8 tenants", lora_tenants, eight),
    ]


@torch.no_grad()
def measure(variants: list[Variant], rounds: int, restart_every: int, device: str) -> None:
    """Lets the variants take turns; the first round after each prefill is thrown away."""
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    vocabulary = variants[0].model.config.vocab_size
    order = list(variants)
    for round_number in range(rounds):
        first = round_number % restart_every == 0
        if first:
            prompt = torch.randint(10, vocabulary, (BATCH_SIZE, PROMPT_LENGTH), device=device)
            for variant in variants:
                variant.prefill(prompt)
                variant.step(synchronise)
        random.shuffle(order)
        for variant in order:
            variant.seconds.append(variant.step(synchronise))


def summary(variant: Variant, base: Variant) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(variant.seconds, base.seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "variant": variant.name,
        "median_ms": round(1000 * statistics.median(variant.seconds), 2),
        "median_ratio": round(median, 4),
        "ratio_quartiles": [round(lower, 4), round(upper, 4)],
        "ratio_of_medians": round(statistics.median(variant.seconds) / statistics.median(base.seconds), 4),
    }


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model [default: SmolLM2-135M-Instruct]")] = "",
    rounds: Annotated[int, typer.Option(help="Timed steps of each variant")] = 60,
    restart_every: Annotated[int, typer.Option(help="Steps after which a new prompt begins")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    random_weights: Annotated[bool, typer.Option(help="Take SmolLM2-135M's shape, without downloading it")] = False,
    output: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON")] = None,
) -> None:
    """Times the variants and prints their medians."""
    set_seed(0)
    load = os.getloadavg()[0]
    kwargs = {"dtype": getattr(torch, dtype)}
    if random_weights:
        config = transformers.LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        base = AutoModelForCausalLM.from_config(config, **kwargs)
    else:
        base = AutoModelForCausalLM.from_pretrained(model or assets.model_folder(), **kwargs)
    variants = variants_of(base.to(device).eval())
    measure(variants, rounds, restart_every, device)
    results = [summary(variant, variants[0]) for variant in variants]
    table = Table("", "ms a step", "of the base step", "quartiles", title="One decoding step")
    for each in results:
        quartiles = "-".join(f"{value:.3f}" for value in each["ratio_quartiles"])
        table.add_row(each["variant"], f"{each['median_ms']:.1f}", f"{each['median_ratio']:.3f}", quartiles)
    Console().print(table)
    if output is not None:
        facts = {
            "model": "random weights, SmolLM2-135M's shape" if random_weights else model or "SmolLM2-135M-Instruct",
            "batch_size": BATCH_SIZE,
            "prompt_length": PROMPT_LENGTH,
            "rounds": rounds,
            "device": device,
            "dtype": dtype,
            "load_before": round(load, 2),
            "machine": machine.facts(),
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
