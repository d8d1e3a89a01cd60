"""Times training steps of FanLoRA on a setting and of PARA beside LoRA on all linear layers and IA3, and their memory.

A step is a forward, a backward and an optimizer step on the same random tokens; the first 16 of each row are the
prompt. All methods take turns on the same base weights. FanLoRA has the rank at which its modules have as many
parameters as LoRA on all of them. Memory is measured in a new process per method.

    python benchmarks/training_steps.py --output benchmarks/results/training-steps-cpu.json
"""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from memory import last_number, peak_megabytes
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from shapes import Shape, load
from torch import nn
from transformers import set_seed

from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig
from peft_fanlora.timing import BASE, Contestant, Stopwatch, in_turns, summaries, twin


RANK = 8
PROMPT_LENGTH = 16
LORA = "LoRA, all modules"
SETTING = Path(__file__).parent.parent / "examples" / "smollm2-setting"


def configs(base: Any) -> dict[str, PeftConfig]:
    """Returns the methods by name."""
    setting = FanLoraSetting.from_pretrained(SETTING)
    every = get_peft_model(twin(base), LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    rank = setting.rank_for_budget(base, every.get_nb_trainable_parameters()[0])
    return {
        LORA: LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        f"{LORA}, again": LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
        f"FanLoRA, {len(setting.kept)} modules": FanLoraConfig(setting=setting, r=rank, task_type="CAUSAL_LM"),
        "IA3 on Q, V and up": IA3Config(
            target_modules=["q_proj", "v_proj", "up_proj"], feedforward_modules=[], task_type="CAUSAL_LM"
        ),
        "PARA": ParaConfig(task_type="CAUSAL_LM"),
    }


class Training:
    """A model in training: each call is a step."""

    def __init__(self, base: nn.Module, config: PeftConfig, checkpointing: bool, rows: int, tokens: int) -> None:
        self.model = get_peft_model(twin(base), config).train()
        if checkpointing:
            self.model.enable_input_require_grads()
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.parameters = sum(parameter.numel() for parameter in trained)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-3)
        device = trained[0].device
        ids = torch.randint(10, self.model.config.vocab_size, (rows, tokens), device=device)
        labels = ids.clone()
        labels[:, :PROMPT_LENGTH] = -100
        self.batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    def __call__(self) -> None:
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main(
    shape: Annotated[Shape, typer.Option(help="SmolLM2's weights, or random ones of a Llama shape")] = Shape.smollm2,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model, in place of a shape")] = "",
    rows: Annotated[int, typer.Option(help="Rows per step")] = 4,
    tokens: Annotated[int, typer.Option(help="Tokens per row")] = 96,
    rounds: Annotated[int, typer.Option(help="Steps of each method")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    processor_time: Annotated[bool, typer.Option(help="Measure CPU time instead of wall-clock time")] = False,
    memory: Annotated[bool, typer.Option(help="Measure the peak memory as well")] = True,
    output: Annotated[Path | None, typer.Option(help="The JSON file to write")] = None,
    only: Annotated[str, typer.Option(help="Print the peak memory of this method alone", hidden=True)] = "",
    checkpointing: Annotated[bool, typer.Option(help="With --only: gradient checkpointing", hidden=True)] = False,
) -> None:
    """Times the methods without and with gradient checkpointing, and prints the ratios to LoRA on all modules."""
    set_seed(0)
    load_before = round(os.getloadavg()[0], 2)
    base = load(shape, model, device, getattr(torch, dtype))
    methods = configs(base)
    if only:
        train = Training(base, methods[only], checkpointing, rows, tokens)
        print(peak_megabytes(lambda: [train() for _ in range(3)], device))
        return
    sizes = ["--rows", str(rows), "--tokens", str(tokens), "--device", device, "--dtype", dtype]
    options = ["--shape", shape.value, "--model", model, *sizes]
    stopwatch, results = Stopwatch(device, processor_time), []
    for has_checkpointing in (False, True):
        made = {name: Training(base, config, has_checkpointing, rows, tokens) for name, config in methods.items()}
        turns = [Contestant(BASE if name == LORA else name, train.model) for name, train in made.items()]
        steps = {turn.name: train for turn, train in zip(turns, made.values(), strict=True)}
        for train in steps.values():
            train()  # the first step is not counted
        seconds = in_turns(turns, range(rounds), lambda turn, steps=steps: stopwatch(steps[turn.name]))
        for (name, train), summary in zip(made.items(), summaries(seconds), strict=True):
            flag = "--checkpointing" if has_checkpointing else "--no-checkpointing"
            peak = {"peak_mb": round(last_number(__file__, "--only", name, flag, *options))} if memory else {}
            row = {"checkpointing": has_checkpointing, "parameters": train.parameters, **peak}
            results.append({**summary, "method": name, **row})
    table = Table(*results[0], title="Training steps; the ratio is to LoRA on all modules")
    for row in results:
        table.add_row(*map(str, row.values()))
    Console(width=140).print(table)
    if output is not None:
        facts = {"model": model or shape.value, "rows": rows, "tokens": tokens, "dtype": dtype, "device": device}
        facts["seconds"] = "processor" if processor_time else "clock"
        content = {**facts, "load_before": load_before, "machine": machine.facts(), "results": results}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
