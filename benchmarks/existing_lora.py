"""Times LoRA adapters in PEFT, and the same adapters loaded by FanLoRA, with many tenants in one batch.

LoRA on all linear layers is saved by PEFT and loaded unchanged as FanLoRA's tenants. The logits of each row are compared,
then decoding steps are timed in turns with the base model.

    python benchmarks/existing_lora.py --output benchmarks/results/existing-lora-cpu.json
"""

import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import contestants
import machine
import torch
import typer
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from shapes import Shape, load
from torch import nn
from transformers import set_seed

from peft_fanlora import FanLoraConfig, load_tenant
from peft_fanlora.timing import BASE, Contestant, Stopwatch, decode_steps, summaries, twin


LORA = "PEFT LoRA, 7 roles"


def loaded_by_fanlora(base: nn.Module, folders: dict[str, Path]) -> PeftModel:
    """Returns a FanLoRA model with LoRA adapters as tenants, by name."""
    (first, folder), *others = folders.items()
    model = PeftModel.from_pretrained(base, folder, first, config=FanLoraConfig.from_lora(folder))
    for name, other in others:
        load_tenant(model, other, name)
    return model.eval()


def main(
    shape: Annotated[Shape, typer.Option(help="SmolLM2's weights, or random ones of a Llama shape")] = Shape.smollm2,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model, in place of a shape")] = "",
    tenants: Annotated[int, typer.Option(help="Tenants in the batch, one row each")] = 8,
    rounds: Annotated[int, typer.Option(help="Decoding steps of each contestant")] = 60,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="The JSON file to write")] = None,
) -> None:
    """Compares the logits and prints the ratios to the base model."""
    set_seed(0)
    load_before = round(os.getloadavg()[0], 2)
    base = load(shape, model, device, torch.float32)

    def prompts() -> torch.Tensor:
        return torch.randint(10, base.config.vocab_size, (tenants, prompt_length), device=device)

    lora = contestants.make(LORA, base, tenants, tenants)
    with TemporaryDirectory() as folder:
        lora.model.save_pretrained(folder)
        folders = {name: Path(folder, name) for name in lora.model.peft_config}
        fanlora = Contestant("same adapters, FanLoRA", loaded_by_fanlora(twin(base), folders), lora.call)
    batch = prompts()
    with torch.inference_mode():
        ours, theirs, plain = (one.model(batch, **one.call).logits for one in (fanlora, lora, Contestant(BASE, base)))
    error, change = (ours - theirs).abs().max().item(), (theirs - plain).abs().max().item()
    made = [Contestant(BASE, base), Contestant(f"{BASE}, again", twin(base)), lora, fanlora]
    results = summaries(decode_steps(made, range(rounds), prompts, Stopwatch(device)))
    table = Table(
        *results[0], title=f"{tenants} tenants; logits differ by at most {error:.1e}, adapters: {change:.1e}"
    )
    for result in results:
        table.add_row(*map(str, result.values()))
    Console(width=120).print(table)
    if output is not None:
        facts = {"model": model or shape.value, "tenants": tenants, "rank": contestants.RANK, "device": device}
        logits = {"largest_difference": error, "largest_change_by_adapters": change}
        content = {
            **facts,
            "load_before": load_before,
            "machine": machine.facts(),
            "logits": logits,
            "results": results,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
