"""Measures the peak memory of one contestant in a new process.

python benchmarks/memory.py "PARA" --shape 135m --tenants 8 --batch-size 8
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import contestants
import torch
import typer
from shapes import Shape, load

from peft_fanlora.timing import Generation


def resident_megabytes(key: str) -> float:
    """Returns a value of /proc/self/status in MiB: "RssAnon" (resident memory except files) or "VmHWM" (peak)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[key].split()[0]) / 1024


def peak_megabytes(work: Callable[[], None], device: str) -> float:
    """Runs `work` and returns the peak memory (MiB) meanwhile, including what was allocated before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak, so that loading is excluded
    work()
    return torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else resident_megabytes("VmHWM")


def last_number(script: str | Path, *arguments: str) -> float:
    """Runs a script in a new process and returns the number that it prints last, such as its peak memory."""
    command = [sys.executable, str(script), *arguments]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def main(
    name: Annotated[str, typer.Argument(help="The contestant")],
    shape: Annotated[Shape, typer.Option(help="The model")] = Shape.m135,
    model: Annotated[str, typer.Option(help="Folder or Hub id, instead of a shape")] = "",
    tenants: Annotated[int, typer.Option(help="Tenants in the batch")] = 1,
    batch_size: Annotated[int, typer.Option(help="Rows")] = 8,
    prompt_length: Annotated[int, typer.Option(help="Tokens of the prompt")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
) -> None:
    """Prints the peak memory (MiB) of a prefill and four decoding steps, including weights and adapters."""
    base = load(shape, model, device, getattr(torch, dtype))
    generation = Generation(contestants.make(name, base, tenants, batch_size))

    @torch.inference_mode()
    def generate() -> None:
        generation.prefill(torch.randint(10, base.config.vocab_size, (batch_size, prompt_length), device=device))
        for _ in range(4):
            generation.step()

    print(peak_megabytes(generate, device))


if __name__ == "__main__":
    typer.run(main)
