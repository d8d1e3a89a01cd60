"""Compares predicted decoding times of settings with measured ones, and the score that each choice keeps for its time.

`module_costs` is measured first; then settings that it has not seen are timed in turns: the choices per layer, by role,
global and within time budgets.

    python benchmarks/costs.py --output benchmarks/results/costs-cpu.json
    .venv-vllm/bin/python benchmarks/costs.py --engine vllm --output benchmarks/results/costs-vllm-cpu.json
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import machine
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed

from peft_fanlora import FanLoraSetting, ImportanceScores, module_costs
from peft_fanlora.fanlora.cost_measurement import step_times
from peft_fanlora.fanlora.costs import Engine


sys.path.append(str(Path(__file__).parent.parent / "examples"))
import assets


SETTING = Path(__file__).parent.parent / "examples" / "smollm2-setting"
"""A setting with the scores of all modules of SmolLM2-135M-Instruct."""
BUDGETS = (1.02, 1.05, 1.1, 1.2, 1.4)


def choices(scores: ImportanceScores, costs: Any) -> dict[str, FanLoraSetting]:
    """Returns the settings to compare, by name."""
    many = 2 * sum(scores.num_layers.values())
    found = {
        "per layer, 1": scores.select(keep=1),
        "per layer, 2": scores.select(keep=2),
        "per layer, 4": scores.select(keep=4),
        "role, 2": scores.select(strategy="role", keep=2),
        f"global, {many}": scores.select(strategy="global", keep=many),
    }
    for budget in BUDGETS:
        try:
            found[f"budget {budget}"] = scores.select(max_slowdown=budget, costs=costs, strategy="global")
        except ValueError:  # not even one module
            continue
    return found


def main(
    engine: Annotated[Engine, typer.Option(help="The engine to time")] = "transformers",
    model: Annotated[str, typer.Option(help="Folder or Hub id [default: SmolLM2-135M-Instruct]")] = "",
    setting: Annotated[Path, typer.Option(help="A setting with the scores of the model's modules")] = SETTING,
    tenants: Annotated[int, typer.Option(help="Tenants in the batch, one row each")] = 8,
    r: Annotated[int, typer.Option(help="Rank of the adapters")] = 8,
    rounds: Annotated[int, typer.Option(help="Decoding steps of each variant")] = 60,
    output: Annotated[Path | None, typer.Option(help="The JSON file to write")] = None,
) -> None:
    """Measures the costs, predicts the time of each choice, and measures it."""
    set_seed(0)
    load = os.getloadavg()[0]
    base = AutoModelForCausalLM.from_pretrained(model or str(assets.model_folder()), dtype=torch.float32).eval()
    options: dict[str, int] = {"r": r, "tenants": tenants, "rounds": rounds}
    costs = module_costs(base, engine, **options)
    scores = ImportanceScores.from_setting(FanLoraSetting.from_pretrained(setting))
    settings = choices(scores, costs)
    _, ratios = step_times(base, engine, [one.names for one in settings.values()], **options)
    results = [
        {
            "choice": name,
            "modules": len(one.kept),
            "score_share": round(sum(scores[module] for module in one.names) / sum(scores.values()), 3),
            "predicted": round(costs.slowdown(one.names), 3),
            "measured": round(ratio, 3),
        }
        for (name, one), ratio in zip(settings.items(), ratios, strict=True)
    ]
    table = Table(*results[0], title=f"{engine}: time of a decoding step / base model's")
    for row in results:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if output is not None:
        content = {**asdict(costs), "parameters": sum(costs.parameters.values())}
        facts = {"load_before": round(load, 2), "machine": machine.facts()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps({"costs": content, **facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
