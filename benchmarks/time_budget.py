"""Compares choices of modules within a time budget: per layer, and of the whole model.

For each seed, LoRA on all linear layers is trained on WordNet definitions and scored. Within budgets of time, one setting
has as many modules in each layer as in any other, give or take one, and one has the highest total score. Compared are the
loss on held-out rows right after pruning and, at the time of two modules per layer, the loss after training again on each
setting, with as many parameters as LoRA on all modules at rank 2, on a second task.

    python benchmarks/time_budget.py --output benchmarks/results/time-budget-cpu.json

A file that exists is continued: what it has is not run again.
"""

import json
import statistics
from collections.abc import Sequence
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
from peft_fanlora.fanlora.choices import Strategy


HERE = Path(__file__).parent
COSTS = HERE / "results" / "costs-cpu.json"
PER_LAYER, GLOBAL, ALL = "per layer", "global", "all modules"
STRATEGIES: dict[str, Strategy] = {PER_LAYER: "layer", GLOBAL: "global"}
TWO_PER_LAYER = "two per layer"
BUDGETS = (1.05, TWO_PER_LAYER, 1.08)
"""The time budgets. The settings with the time of two modules per layer are trained again."""
SOURCE, TASK = "gloss", "category"
STEPS = {SOURCE: Search.steps, TASK: Run.steps}


def measured_costs(base: Any, path: Path) -> ModuleCosts:
    """Returns the costs that `benchmarks/costs.py` has measured."""
    content = json.loads(path.read_text())["costs"]
    rank = content["conditions"]["r"]
    sizes = {name: rank * num_parameters_per_rank(module) for name, module in candidates(base).items()}
    return ModuleCosts(**{**content, "parameters": sizes})


def after_pruning(bench: Bench, seed: int, costs: Path) -> tuple[dict[str, FanLoraSetting], list[dict[str, Any]]]:
    """Returns the settings with the time of two modules per layer, and what all settings keep and lose untrained."""
    search = Search(SOURCE, (), seed=seed)
    split = bench.split(SOURCE)
    config = FanLoraConfig(r=search.rank, lora_alpha=2 * search.rank, task_type="CAUSAL_LM")
    model = get_peft_model(bench.base(seed), config)
    bench.train(model, split.training(STEPS[SOURCE] * BATCH_SIZE, seed), search.learning_rate, STEPS[SOURCE])
    scores = model.score_modules(bench.tokens.loader(split.calibration[:16]), num_points=8)
    times = measured_costs(model.get_base_model(), costs)
    two_per_layer = times.slowdown(scores.select(keep=2).names)
    found: list[dict[str, Any]] = []

    def pruned(choice: str, budget: float | str | None, modules: Sequence[str]) -> None:
        switch(model, modules)
        loss = evaluate(model, bench.tokens, split.dev, split.task, choice)["loss"]
        share = sum(scores[module] for module in modules) / sum(scores.values())
        facts = {"modules": len(modules), "slowdown": round(times.slowdown(modules), 4), "score": round(share, 4)}
        found.append({"seed": seed, "choice": choice, "budget": budget, **facts, "loss": loss})

    pruned(ALL, None, list(scores))
    settings: dict[str, FanLoraSetting] = {}
    for budget in BUDGETS:
        for choice, strategy in STRATEGIES.items():
            most = two_per_layer if isinstance(budget, str) else budget
            setting = scores.select(max_slowdown=most, costs=times, strategy=strategy)
            pruned(choice, budget, setting.names)
            if budget == TWO_PER_LAYER:
                settings[choice] = setting
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


def differences(results: list[dict[str, Any]], choice: str, other: str) -> list[dict[str, Any]]:
    """Returns the differences of two choices' losses by seed, and their mean, for each budget."""
    losses = {(one.get("budget"), one["choice"], one["seed"]): one["loss"] for one in results}
    found = []
    for budget in dict.fromkeys(one.get("budget") for one in results if one["choice"] == choice):
        seeds = sorted(seed for where, name, seed in losses if (where, name) == (budget, choice))
        by_seed = [round(losses[budget, choice, seed] - losses[budget, other, seed], 4) for seed in seeds]
        mean = round(statistics.mean(by_seed), 4)
        found.append({"choice": choice, "minus": other, "budget": budget, "by_seed": by_seed, "mean": mean})
    return found


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
    if output is not None and output.exists():
        content = json.loads(output.read_text())

    def save(part: str, found: list[dict[str, Any]]) -> None:
        content[part] += found
        pairs = [(GLOBAL, PER_LAYER)] if part == "pruned" else [(GLOBAL, PER_LAYER), (PER_LAYER, ALL), (GLOBAL, ALL)]
        compared = [each for choice, other in pairs for each in differences(content[part], choice, other)]
        content["differences"] = {**content.get("differences", {}), part: compared}
        Console().print_json(data=content["differences"])
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(content, indent=1) + "\n")

    def is_finished(part: str, seed: int) -> bool:
        return any(one["seed"] == seed for one in content[part])

    for seed in range(seeds):
        if is_finished("pruned", seed) and is_finished("retrained", seed):
            continue
        settings, found = after_pruning(bench, seed, costs)
        if not is_finished("pruned", seed):
            save("pruned", found)
        if not is_finished("retrained", seed):
            save("retrained", after_retraining(bench, seed, settings))


if __name__ == "__main__":
    typer.run(main)
