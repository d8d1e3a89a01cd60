"""Measures the time and memory of one more tenant on a model with 10, 100 and 1000 tenants.

python benchmarks/tenants.py --shape 135m --output benchmarks/results/tenants-cpu.json
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import contestants
import machine
import torch
import typer
from memory import resident_megabytes
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shapes import Shape, load
from transformers import set_seed

from peft_fanlora import load_tenant
from peft_fanlora.timing import Contestant, Generation


def milliseconds(work: Callable[[], Any], times: int) -> float:
    """Returns the median time of a call in milliseconds."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 1)


def change_costs(model: PeftModel, folder: Path, load_one: Callable[..., Any]) -> tuple[float, float]:
    """Returns the times of loading and of deleting a tenant in milliseconds."""
    loading = milliseconds(lambda: load_one(folder, f"guest{len(model.peft_config)}"), 3)
    deleting = milliseconds(lambda: model.delete_adapter(next(reversed(model.peft_config))), 3)
    return loading, deleting


def costs(method: str, shape: Shape, model: str, counts: list[int]) -> list[dict[str, Any]]:
    """Loads tenants of a method up to each count, and returns the time and memory per tenant at that count."""
    set_seed(0)
    base = load(shape, model, "cpu", torch.float32)
    one: Any = contestants.make(method, base, 1, 8).model
    size = sum(tensor.nbytes for tensor in get_peft_model_state_dict(one, adapter_name="tenant0").values())
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        one.save_pretrained(name, selected_adapters=["tenant0"])
        folder = Path(name) / "tenant0"
        before, loaded = resident_megabytes("RssAnon"), 1
        for count in counts:
            for tenant in track(range(loaded, count), description=f"{method}, {count}", transient=True):
                load_tenant(one, folder, f"tenant{tenant}")
            loaded = count
            memory = (resident_megabytes("RssAnon") - before) * 2**20 / (count - 1)
            loading, deleting = change_costs(one, folder, partial(load_tenant, one))
            generation = Generation(
                Contestant(method, one, {"adapter_names": [f"tenant{row % count}" for row in range(8)]})
            )
            with torch.inference_mode():
                generation.prefill(torch.randint(10, base.config.vocab_size, (8, 16)))
                step = milliseconds(generation.step, 9)
            results.append(
                {
                    "method": method,
                    "tenants": count,
                    "load_tenant_ms": loading,
                    "load_adapter_ms": change_costs(one, folder, one.load_adapter)[0],
                    "delete_adapter_ms": deleting,
                    "step_ms": step,
                    "resident_of_adapter_size": round(memory / size, 3),
                }
            )
    return results


def main(
    shape: Annotated[Shape, typer.Option(help="The model")] = Shape.m135,
    model: Annotated[str, typer.Option(help="Folder or Hub id, instead of a shape")] = "",
    counts: Annotated[list[int] | None, typer.Option(help="Numbers of tenants [default: 10 100 1000]")] = None,
    method: Annotated[list[str] | None, typer.Option(help="[default: FanLoRA, 2 per layer; PARA]")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Loads tenants and prints the time and memory per tenant for each number of tenants."""
    # One process per method: memory that an earlier method has freed would be reused without increasing RssAnon.
    with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
        arguments = [
            (name, shape, model, counts or [10, 100, 1000]) for name in method or ["FanLoRA, 2 per layer", "PARA"]
        ]
        results = [result for found in processes.starmap(costs, arguments, chunksize=1) for result in found]
    table = Table(*results[0])
    for result in results:
        table.add_row(*(str(value) for value in result.values()))
    Console(width=140).print(table)
    if output is not None:
        facts = {"model": model or shape.value, "machine": machine.facts()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
