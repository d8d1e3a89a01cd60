"""Times FanLoRA, PARA, PEFT's LoRA and IA3, and the base model with many tenants in one batch.

Measures decoding steps, prefill, tokens per second with one and three beams, and peak memory, for 1, 8, 32 and 64
tenants. The result is the ratio to the base model's time in the same round. Results are added to the file of
`--output`, so that a long measurement can be split into several runs.

    python benchmarks/serving.py --tenants 1 --tenants 8 --measure decode --output benchmarks/results/serving-cpu.json
    python benchmarks/serving.py --shape 7b --device cuda --dtype bfloat16 --output benchmarks/results/serving-gpu.json
"""

import gc
import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import contestants
import machine
import memory
import serving_plots
import torch
import typer
from rich.console import Console
from rich.table import Table
from shapes import Shape, load
from timing import generations, prefills
from transformers import set_seed

from peft_fanlora.timing import BASE, Stopwatch, decode_steps, summaries


class Measure(StrEnum):
    """The available measurements."""

    decode = "decode"
    prefill = "prefill"
    beams1 = "beams1"
    beams3 = "beams3"
    memory = "memory"


def show(measure: str, tenants: int, results: list[dict[str, Any]]) -> None:
    table = Table(*results[0])
    table.title = f"{measure}, {tenants} tenants"
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console(width=120).print(table)


def merged(file: Path, facts: dict[str, Any], new: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of the result file, in which new results replace those with the same measure and tenants."""
    earlier = json.loads(file.read_text())["results"] if file.exists() else []
    again = {(result["measure"], result["tenants"]) for result in new}
    kept = [result for result in earlier if (result["measure"], result["tenants"]) not in again]
    order = [measure.value for measure in Measure]
    return {**facts, "results": sorted(kept + new, key=lambda one: (order.index(one["measure"]), one["tenants"]))}


def main(
    shape: Annotated[Shape, typer.Option(help="SmolLM2, or random weights of a Llama shape")] = Shape.smollm2,
    model: Annotated[str, typer.Option(help="Folder or Hub id of a model, instead of a shape")] = "",
    tenants: Annotated[list[int] | None, typer.Option(help="Tenants in the batch [default: 1 8 32 64]")] = None,
    batch_size: Annotated[int, typer.Option(help="Rows; 0 for the maximum of 8 and the tenants")] = 0,
    measure: Annotated[list[Measure] | None, typer.Option(help="What to measure [default: all]")] = None,
    only: Annotated[list[str] | None, typer.Option(help="Contestants besides the base model [default: all]")] = None,
    rounds: Annotated[int, typer.Option(help="Decoding steps of each contestant")] = 60,
    slow_rounds: Annotated[int, typer.Option(help="Prefills and generations of each contestant")] = 5,
    prompt_length: Annotated[int, typer.Option(help="Tokens of each prompt")] = 64,
    new_tokens: Annotated[int, typer.Option(help="Tokens that `generate` returns for each row")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16")] = "float32",
    processor_time: Annotated[bool, typer.Option(help="Measure CPU time instead of wall-clock time")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for two plots of the results")] = None,
) -> None:
    """Times the contestants and prints their medians."""
    set_seed(0)
    before = round(os.getloadavg()[0], 2)
    base = load(shape, model, device, getattr(torch, dtype))
    stopwatch = Stopwatch(device, processor_time)
    options = ["--shape", shape.value, "--model", model, "--device", device, "--dtype", dtype]
    options += ["--prompt-length", str(prompt_length)]
    facts = {
        "model": model or ("SmolLM2-135M-Instruct" if shape is Shape.smollm2 else f"random, {shape.value}"),
        "prompt_length": prompt_length,
        "new_tokens": new_tokens,
        "rank": contestants.RANK,
        "device": device,
        "dtype": dtype,
        "seconds": "processor" if processor_time else "clock",
        "load_before": before,
        "machine": machine.facts(),
    }
    for num_tenants in tenants or [1, 8, 32, 64]:
        rows = batch_size or max(8, num_tenants)
        names = [name for name in contestants.names(num_tenants) if name == BASE or name in (only or [name])]
        made = [contestants.make(name, base, num_tenants, rows) for name in names]

        def prompts(rows: int = rows) -> torch.Tensor:
            return torch.randint(10, base.config.vocab_size, (rows, prompt_length), device=device)

        for one in measure or list(Measure):
            if one is Measure.memory:
                scale = ["--tenants", str(num_tenants), "--batch-size", str(rows)]
                found = [
                    {"method": name, "peak_mb": round(memory.last_number(memory.__file__, name, *options, *scale))}
                    for name in names
                ]
            elif one is Measure.decode:
                found = summaries(decode_steps(made, range(rounds), prompts, stopwatch))
            elif one is Measure.prefill:
                found = summaries(prefills(made, slow_rounds, prompts, stopwatch))
            else:
                beams = 1 if one is Measure.beams1 else 3
                seconds = generations(made, slow_rounds, prompts, stopwatch, new_tokens, beams)
                found = summaries(seconds)
                for result in found:
                    result["tokens_per_s"] = round(1000 * rows * new_tokens / result["median_ms"], 1)
            show(one.value, num_tenants, found)
            if output is not None:
                case = {"measure": one.value, "tenants": num_tenants, "batch_size": rows}
                content = merged(output, facts, [{**case, **each} for each in found])
                output.parent.mkdir(parents=True, exist_ok=True)
                output.write_text(json.dumps(content, indent=1) + "\n")
        del made
        gc.collect()
    if output is not None and plots is not None:
        serving_plots.draw(json.loads(output.read_text()), plots)


if __name__ == "__main__":
    typer.run(main)
