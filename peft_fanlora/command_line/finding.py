"""The command `find`: steps (a) to (c) of FanLoRA on a model and a data set."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import set_seed

from ..fanlora import report as reports
from ..fanlora.choices import Engine, ScoreName, Strategy
from ..fanlora.config import FanLoraConfig
from ..fanlora.costs import ModuleCosts
from ..fanlora.extras import from_extra
from ..fanlora.scores import ImportanceScores
from ..fanlora.scoring import check_selection
from ..fanlora.setting import FanLoraSetting
from ..sharing.writing import staged
from . import sources
from .output import show_facts


@dataclass(frozen=True)
class Plan:
    """The options of `find`; see the command's help."""

    model: str
    adapter: str | None
    output: Path
    steps: int
    batch_size: int
    learning_rate: float
    max_length: int
    r: int
    method: ScoreName
    strategy: Strategy
    keep: int
    packed: bool
    max_slowdown: float | None
    engine: Engine
    costs: Path | None
    seed: int


def run(
    plan: Plan, dataset: str, split: str, name: str | None, rows: int | None, calibration_rows: int
) -> tuple[dict[str, Any], FanLoraSetting]:
    """Finds a setting and saves it. Returns the report and the setting.

    Raises:
        ValueError: the model or the data cannot be read, or the data has too few rows.
        ModuleNotFoundError: TRL or plotly is missing.
    """
    with from_extra("cli,trl", "find trains with TRL"):
        from trl import SFTConfig, SFTTrainer
    reports.import_plotly()
    tokenizer, base, data = _read(plan, dataset, split, name, rows, calibration_rows)
    budget = _budget(plan, base)
    set_seed(plan.seed)
    if plan.adapter is None:
        config = FanLoraConfig(r=plan.r, lora_alpha=2 * plan.r, task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, config)
    else:
        model = PeftModel.from_pretrained(base, plan.adapter, config=sources.adapter_config(plan.adapter))
    selection = {"keep": plan.keep, "strategy": plan.strategy, "packed": plan.packed, **budget}
    check_selection(model.base_model, **selection)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = SFTConfig(
            scratch,
            max_steps=plan.steps,
            per_device_train_batch_size=plan.batch_size,
            per_device_eval_batch_size=plan.batch_size,
            learning_rate=plan.learning_rate,
            warmup_steps=max(1, round(0.06 * plan.steps)),
            max_length=plan.max_length,
            bf16=torch.cuda.is_available(),  # emulated on most CPUs
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            seed=plan.seed,
        )
        trainer = SFTTrainer(
            model,
            args=arguments,
            processing_class=tokenizer,
            train_dataset=data.select(range(calibration_rows, len(data))),
            eval_dataset=data.select(range(calibration_rows)),
        )
        with model.disable_adapter():
            before = trainer.evaluate()["eval_loss"]
        if plan.adapter is None:
            trainer.train()
        trained = trainer.evaluate()["eval_loss"]
        scores = model.score_modules(trainer.get_eval_dataloader(), method=plan.method)
        setting = model.prune_modules(scores.select(**selection))
        pruned = trainer.evaluate()["eval_loss"]
    is_trained = plan.adapter is None
    report = {
        "model": plan.model,
        "adapter": plan.adapter,
        "dataset": dataset,
        "rows_trained_on": len(data) - calibration_rows if is_trained else 0,
        "calibration_rows": calibration_rows,
        "steps": plan.steps if is_trained else 0,
        "seed": plan.seed,
        "modules_scored": len(scores),
        "modules_kept": len(setting.kept),
        "calibration_loss": {"base model": before, "all modules": trained, "kept modules": pruned},
        "output": str(plan.output),
    }
    _write(plan.output, model, setting, scores, budget.get("costs"), report)
    return report, setting


def show(report: dict[str, Any]) -> None:
    """Prints the losses before and after pruning, and the kept modules."""
    show_facts(
        f"loss on the {report['calibration_rows']} calibration rows in nats per token, without retraining after pruning",
        {name: f"{loss:.3f}" for name, loss in report["calibration_loss"].items()},
    )
    folder = Path(report["output"])
    print(f"Wrote the setting to {folder}, its adapter to {folder / 'adapter'}, a report to {folder / 'report.html'}")


def _read(
    plan: Plan, dataset: str, split: str, name: str | None, rows: int | None, calibration_rows: int
) -> tuple[Any, Any, Any]:
    if plan.output.is_file():
        raise ValueError(f"{plan.output} is a file; pass the folder to write with --output.")
    sources.model_config(plan.model)
    data = sources.dataset(dataset, split, name, rows)
    if len(data) <= calibration_rows:
        raise ValueError(
            f"The data set has {len(data)} rows, of which {calibration_rows} are used for scoring: pass more rows or "
            "a smaller --calibration-rows."
        )
    return sources.tokenizer(plan.model), sources.causal_model(plan.model), data.shuffle(seed=plan.seed)


def _budget(plan: Plan, base: Any) -> dict[str, Any]:
    """Returns the arguments of `select` for a time budget, if there is one."""
    if plan.max_slowdown is None:
        return {}
    if plan.costs is not None:
        return {"max_slowdown": plan.max_slowdown, "costs": ModuleCosts.load(plan.costs)}
    from ..fanlora.cost_measurement import module_costs

    base.to("cuda" if torch.cuda.is_available() else "cpu")
    return {"max_slowdown": plan.max_slowdown, "costs": module_costs(base, plan.engine, r=plan.r)}


def _write(
    folder: Path,
    model: PeftModel,
    setting: FanLoraSetting,
    scores: ImportanceScores,
    costs: ModuleCosts | None,
    report: dict[str, Any],
) -> None:
    page = reports.page(scores, setting, costs)
    setting.save_pretrained(folder)
    model.save_pretrained(str(folder / "adapter"))
    content = {**report, "scores": dict(scores)}
    with staged(folder) as stage:
        (stage / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (stage / "report.html").write_text(page, encoding="utf-8")
        if costs is not None:
            costs.save(stage / "module-costs.json")
