"""The peak memory of one contestant, in a process of its own.

python benchmarks/memory.py "PARA" --shape 135m --tenants 8 --batch-size 8
"""

from pathlib import Path
from typing import Annotated

import contestants
import torch
import typer
from shapes import Shape, load

from peft_fanlora.command_line.timing import Generation


def resident_megabytes(key: str) -> float:
    """Returns what Linux says of this process: "RssAnon", what it holds but for files, or "VmHWM", the most it held."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


def main(
    name: Annotated[str, typer.Argument(help="The contestant")],
    shape: Annotated[Shape, typer.Option(help="The model")] = Shape.m135,
    model: Annotated[str, typer.Option(help="Folder or Hub id, in place of a shape")] = "",
    tenants: Annotated[int, typer.Option(help="Tenants in the batch")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows")] = 8,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    """Prints the megabytes that a prompt and four tokens take at the most, weights and adapters included."""
    base = load(shape, model, device, getattr(torch, dtype))
    generation = Generation(contestants.make(name, base, tenants, batch_size))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # what counts is serving, not loading
    with torch.inference_mode():
        generation.prefill(torch.randint(10, base.config.vocab_size, (batch_size, prompt_length), device=device))
        for _ in range(4):
            generation.step()
    print(torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident_megabytes("VmHWM"))


if __name__ == "__main__":
    typer.run(main)
