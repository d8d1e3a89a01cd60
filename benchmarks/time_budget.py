"""Compares a choice of modules by time with the choice per layer, at the same time of a decoding step.

For each seed, LoRA on all linear layers is trained on WordNet definitions and scored. Then two settings are made: the best
two modules per layer, and the modules with the highest total score whose predicted step takes no longer. Compared are the
loss on held-out rows right after pruning, and after training again on each setting, with as many parameters as LoRA
on all modules at rank 2, on a second task.

    python benchmarks/time_budget.py --output benchmarks/results/time-budget-cpu.json
"""

import json
import statistics
from pathlib import Path
from typing import Annotated, Any

import typer
from peft import get_peft_model
from quality.experiments import LORA_RANK_2, Run, Search, Store
from quality.search import switch
from quality.tasks import BATCH_SIZE, evaluate
from quality.training import Bench
from rich.console import Console

from peft_fanlora import FanLoraConfig, FanLoraSetting, ModuleCosts
from peft_fanlora.fanlora.candidates import candidates, num_parameters_per_rank


HERE = Path(__file__).parent
COSTS = HERE / "results" / "costs-cpu.json"
PER_LAYER, BY_TIME, ALL = "two per layer", "by time", "all modules"
SOURCE, TASK = "gloss", "category"
STEPS = {SOURCE: Search.steps, TASK: Run.steps}


def measured_costs(base: Any, path: Path) -> ModuleCosts:
    """Returns the costs that `benchmarks/costs.py` has measured."""
    content = json.loads(path.read_text())["costs"]
    rank = content["conditions"]["r"]
    sizes = {name: rank * num_parameters_per_rank(module) for name, module in candidates(base).items()}
    return ModuleCosts(**{**content, "parameters": sizes})


def after_pruning(bench: Bench, seed: int, costs: Path) -> tuple[dict[str, FanLoraSetting], list[dict[str, Any]]]:
    """Returns the two settings of a seed, and what they keep and lose without more training."""
    search = Search(SOURCE, (), seed=seed)
    split = bench.split(SOURCE)
    config = FanLoraConfig(r=search.rank, lora_alpha=2 * search.rank, task_type="CAUSAL_LM")
    model = get_peft_model(bench.base(seed), config)
    bench.train(model, split.training(STEPS[SOURCE] * BATCH_SIZE, seed), search.learning_rate, STEPS[SOURCE])
    scores = model.score_modules(bench.tokens.loader(split.calibration[:16]), num_points=8)
    times = measured_costs(model.get_base_model(), costs)
    per_layer = scores.select(keep=2)
    by_time = scores.select(max_slowdown=times.slowdown(per_layer.names), costs=times)
    settings = {PER_LAYER: per_layer, BY_TIME: by_time}
    found = []
    for name, modules in {ALL: list(scores), PER_LAYER: per_layer.names, BY_TIME: by_time.names}.items():
        switch(model, modules)
        loss = evaluate(model, bench.tokens, split.dev, split.task, name)["loss"]
        share = sum(scores[module] for module in modules) / sum(scores.values())
        facts = {"modules": len(modules), "slowdown": round(times.slowdown(modules), 4), "score": round(share, 4)}
        found.append({"seed": seed, "choice": name, **facts, "loss": loss})
    return settings, found


def after_retraining(bench: Bench, seed: int, settings: dict[str, FanLoraSetting]) -> list[dict[str, Any]]:
    """Returns the loss on the test rows of the second task, of each setting and of LoRA on all modules."""
    split = bench.split(TASK)
    found = []
    for name, setting in {ALL: None, **settings}.items():
        base = bench.base(seed)
        setting = setting or FanLoraSetting.from_modules(base, list(candidates(base)))
        rank = setting.rank_for_budget(base, LORA_RANK_2)
        config = FanLoraConfig(setting=setting, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        rate = bench.store.best_learning_rate("lora" if name == ALL else "fanlora", "path")
        bench.train(model, split.training(STEPS[TASK] * BATCH_SIZE, seed), rate, STEPS[TASK])
        parameters = model.get_nb_trainable_parameters()[0]
        loss = evaluate(model, bench.tokens, split.test, split.task, name)["loss"]
        found.append({"seed": seed, "choice": name, "parameters": parameters, "learning_rate": rate, "loss": loss})
    return found


def differences(results: list[dict[str, Any]], choice: str, other: str) -> dict[str, Any]:
    """Returns the differences of two choices' losses by seed, and their mean."""
    losses = {(one["choice"], one["seed"]): one["loss"] for one in results}
    seeds = sorted({one["seed"] for one in results})
    by_seed = [round(losses[choice, seed] - losses[other, seed], 4) for seed in seeds]
    return {"choice": choice, "minus": other, "by_seed": by_seed, "mean": round(statistics.mean(by_seed), 4)}


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of SmolLM2-135M-Instruct")] = "",
    seeds: Annotated[int, typer.Option(help="Number of seeds")] = 3,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    costs: Annotated[Path, typer.Option(help="File of `benchmarks/costs.py`")] = COSTS,
    output: Annotated[Path | None, typer.Option(help="The JSON file to write, after each part of a seed")] = None,
) -> None:
    """Trains, prunes and retrains for each seed."""
    import assets

    bench = Bench(model or str(assets.model_folder()), device, Store(HERE / "results" / "quality"))
    content: dict[str, Any] = {**bench.facts(), "device": device, "pruned": [], "retrained": []}
    content["differences"] = {}
    settings: dict[int, dict[str, FanLoraSetting]] = {}

    def save(part: str, found: list[dict[str, Any]], *others: str) -> None:
        content[part] += found
        content["differences"][part] = [differences(content[part], BY_TIME, other) for other in others]
        Console().print_json(data=content["differences"])
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(content, indent=1) + "\n")

    for seed in range(seeds):
        settings[seed], found = after_pruning(bench, seed, costs)
        save("pruned", found, PER_LAYER)
    for seed in range(seeds):
        save("retrained", after_retraining(bench, seed, settings[seed]), PER_LAYER, ALL)


if __name__ == "__main__":
    typer.run(main)
