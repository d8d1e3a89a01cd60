"""The search for a setting: LoRA on all modules, its scores, and what is lost when the rest goes unretrained."""

import time
from collections.abc import Iterable
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from tqdm.auto import tqdm

from peft_fanlora import FanLoraConfig, FanLoraSetting
from peft_fanlora.fanlora.candidates import candidates
from peft_fanlora.fanlora.modules import ModuleName

from .experiments import Scoring, Search
from .methods import importance, random_setting
from .tasks import BATCH_SIZE, Split, evaluate
from .training import Bench


RANDOM_DRAWS = 3


def search(bench: Bench, run: Search) -> dict[str, Any]:
    """Trains, scores, and evaluates what each choice keeps on the source's dev rows."""
    split = bench.split(run.task)
    config = FanLoraConfig(r=run.rank, lora_alpha=2 * run.rank, task_type="CAUSAL_LM")
    model = get_peft_model(bench.base(run.seed), config)
    rows = split.training(run.steps * BATCH_SIZE, run.seed)
    training = bench.train(model, rows, run.learning_rate, run.steps)
    scored = [_score(bench, model, split, scoring) for scoring in run.scorings]
    result: dict[str, Any] = {"training": training, "scored": scored}
    if run.prune:
        result["pruned"] = _prune(bench, model, split, scored)
    return {**bench.facts(), **result}


def _score(bench: Bench, model: PeftModel, split: Split, scoring: Scoring) -> dict[str, Any]:
    rows = split.calibration[scoring.first :][: scoring.rows]
    started = time.process_time()
    scores = model.score_modules(bench.tokens.loader(rows), method=scoring.method, num_points=scoring.points)
    values = {name: float(f"{value:.6g}") for name, value in scores.items()}
    seconds = round(time.process_time() - started, 1)
    return {"scoring": vars(scoring), "cpu_seconds": seconds, "num_tokens": scores.num_tokens, "values": values}


def choices(num_layers: int) -> dict[str, tuple[str, int]]:
    """Returns ways of choosing: one, two or three modules per layer, and two other ways to keep as many as two per layer."""
    per_layer = {f"{keep} per layer": ("layer", keep) for keep in (1, 2, 3)}
    return {**per_layer, "2 roles": ("role", 2), f"{2 * num_layers} anywhere": ("global", 2 * num_layers)}


def _prune(bench: Bench, model: PeftModel, split: Split, scored: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the dev loss with all modules, with none, and with those of each choice only."""
    base = model.get_base_model()
    everything = list(candidates(base))
    kept: list[tuple[str, str, Iterable[str]]] = [("all", "all", everything), ("none", "none", ())]
    for name, (strategy, keep) in choices(len({ModuleName.parse(name).block for name in everything})).items():
        for entry in scored:
            method = entry["scoring"]["method"]
            setting: FanLoraSetting = importance(entry["values"], method).select(keep, strategy=strategy)
            kept.append((name, method, setting.names))
        kept += [
            (name, f"random {draw}", random_setting(base, draw, strategy, keep).names) for draw in range(RANDOM_DRAWS)
        ]
    losses = []
    for choice, method, names in tqdm(kept, desc="Pruning"):
        switch(model, names)
        loss = evaluate(model, bench.tokens, split.dev, split.task, f"{method}, {choice}")
        losses.append({"choice": choice, "method": method, **loss})
    switch(model, everything)
    return losses


def switch(model: PeftModel, names: Iterable[str]) -> None:
    """Switches the LoRA of the named modules on and all others off, as if these had been pruned."""
    on = set(names)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", float(name in on))
