"""The long version of the quickstart, with more comparisons: `quickstart.py --full`.

(a) LoRA on all linear layers, trained on WordNet definitions; (b) a score for each module; (c) the best two modules per
layer are kept: the FanLoRA setting; (d) a new adapter on this setting learns another task, the sentiment of movie reviews,
and is compared with LoRA on all layers and on Q and V with the same number of parameters.
"""

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import assets
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from training import BATCH_SIZE, losses, sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from trl import SFTTrainer

from peft_fanlora import FanLoraConfig, FanLoraSetting, ImportanceScores, export_lora
from peft_fanlora.timing import twin


KEEP = 2
RANDOM_DRAWS = 3
LEARNING_RATE = 1e-3
NUM_CALIBRATION = 16
NUM_HELD_OUT = 64
NUM_TASK_HELD_OUT = 128
RANK_ON_ALL_MODULES = 4
"""Rank of LoRA on all modules in (d); the others get the rank with the closest number of parameters."""

# Loads a folder written by export_lora in a process that never imports peft_fanlora, and completes a prompt.
PLAIN_PEFT = """
import sys
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
base, adapter, prompt = sys.argv[1:]
model, tokenizer = AutoPeftModelForCausalLM.from_pretrained(adapter), AutoTokenizer.from_pretrained(base)
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
assert "peft_fanlora" not in sys.modules
"""

console = Console()


@dataclass(frozen=True)
class Run:
    """Settings that all steps share."""

    base_model: str
    output: Path
    seed: int

    @property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.base_model)

    @cached_property
    def weights(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.base_model, dtype=torch.float32)

    def base(self) -> PreTrainedModel:
        """Sets the seed and returns the base model for one adapter: a copy that shares the weights."""
        set_seed(self.seed)
        return twin(self.weights)

    def trainer(
        self,
        model: PeftModel,
        steps: int,
        training: Dataset,
        *,
        learning_rate: float = LEARNING_RATE,
        batch_size: int = BATCH_SIZE,
        **held_out: Dataset,
    ) -> SFTTrainer:
        """Creates TRL's trainer; `get_eval_dataloader(name)` returns the batches of a held-out set."""
        arguments = sft_arguments(self.output, steps, learning_rate, batch_size=batch_size)
        return SFTTrainer(
            model, args=arguments, processing_class=self.tokenizer, train_dataset=training, eval_dataset=held_out
        )


def evaluate(
    model: torch.nn.Module, dataloader: DataLoader, name: str, choices: tuple[int, ...] = ()
) -> dict[str, float]:
    """Returns the loss in nats per label token, and with `choices` the accuracy of the first answer token."""
    found = losses(model, tqdm(dataloader, desc=f"Evaluating {name}", leave=False), choices)
    return {"loss": found.mean} | ({"accuracy": found.accuracy} if choices else {})


def num_adapter_parameters(model: PeftModel) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)


def file_size(folder: Path) -> str:
    return f"{(folder / 'adapter_model.safetensors').stat().st_size / 1e6:.1f} MB"


def random_setting(model: PeftModel, scores: ImportanceScores, draw: int) -> FanLoraSetting:
    """Returns a random setting with as many modules per layer as the scored setting."""
    layers = scores.to_dataframe().groupby("layer")["module"]
    generator = random.Random(draw)
    names = [name for _, layer in layers for name in generator.sample(layer.tolist(), KEEP)]
    return FanLoraSetting.from_modules(model.get_base_model(), names)


def find_setting(run: Run, instructions: Dataset, steps: int) -> tuple[ImportanceScores, dict[str, Any]]:
    """Runs steps (a) to (c), writes the setting and the adapter, and returns the losses of all choices of modules."""
    console.rule("(a) LoRA on all linear layers")
    model = get_peft_model(run.base(), FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    held_out = instructions.select(range(NUM_HELD_OUT))
    calibration = instructions.select(range(NUM_HELD_OUT, NUM_HELD_OUT + NUM_CALIBRATION))
    training = instructions.select(range(NUM_HELD_OUT + NUM_CALIBRATION, len(instructions)))
    trainer = run.trainer(model, steps, training, held_out=held_out, calibration=calibration)
    test = trainer.get_eval_dataloader("held_out")
    results: dict[str, Any] = {}

    def record(name: str, model: PeftModel, folder: Path | None = None) -> None:
        size = folder and file_size(folder)
        results[name] = {**evaluate(model, test, name), "parameters": num_adapter_parameters(model), "file": size}

    with model.disable_adapter():
        results["base model"] = {**evaluate(model, test, "base model"), "parameters": 0, "file": None}
    trainer.train()
    model.save_pretrained(run.output / "all-modules")
    record("LoRA on all modules", model, run.output / "all-modules")

    console.rule("(b) a score for each module")
    scores = model.score_modules(trainer.get_eval_dataloader("calibration"), method="path")

    console.rule(f"(c) the best {KEEP} modules per layer")
    setting = model.prune_modules(scores.select(keep=KEEP))
    console.print(str(setting), highlight=False)
    setting.save_pretrained(run.output / "setting")
    scores.plot(run.output / "importance.png", setting)
    model.save_pretrained(run.output / "adapter")
    record("pruned by score", model, run.output / "adapter")
    for draw in range(RANDOM_DRAWS):
        other = PeftModel.from_pretrained(run.base(), run.output / "all-modules")
        other.prune_modules(random_setting(other, scores, draw))
        record(f"pruned at random, draw {draw + 1}", other)

    export_lora(model, run.output / "plain-lora")
    results["sample"] = sample(run, model, held_out[0]["prompt"])
    return scores, results


def sample(run: Run, model: PeftModel, messages: list[assets.Message]) -> str:
    """Answers a prompt, and checks that the exported adapter gives the same answer without this package."""
    tokenizer = run.tokenizer
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    command = [sys.executable, "-c", PLAIN_PEFT, run.base_model, str(run.output / "plain-lora"), prompt]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the exported adapter cannot be used: {done.stderr}")
    exported = done.stdout.strip()
    if exported != answer:
        raise RuntimeError(f"the exported adapter answers {exported!r}, the original {answer!r}")
    return f"{messages[-1]['content']} {answer}"


def equal_configs(base: PreTrainedModel, folder: Path, scores: ImportanceScores) -> dict[str, LoraConfig]:
    """Returns configurations with about the same number of parameters on three choices of modules.

    Args:
        base: the base model.
        folder: the folder of the setting.
        scores: the scores of all modules.
    """
    on_all = FanLoraSetting.from_modules(base, scores)
    on_q_v = FanLoraSetting.from_modules(base, [name for name in scores if name.endswith(("q_proj", "v_proj"))])
    all_modules = LoraConfig(r=RANK_ON_ALL_MODULES, target_modules=on_all.names)
    budget = num_adapter_parameters(get_peft_model(twin(base), all_modules))

    def config(config_class: type[LoraConfig], choice: FanLoraSetting, **target: Any) -> LoraConfig:
        rank = choice.rank_for_budget(base, budget)
        return config_class(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM", **target)

    return {
        "FanLoRA": config(FanLoraConfig, FanLoraSetting.from_pretrained(folder), setting=folder),
        "LoRA on all modules": config(LoraConfig, on_all, target_modules="all-linear"),
        "LoRA on Q and V": config(LoraConfig, on_q_v, target_modules=["q_proj", "v_proj"]),
    }


def use_setting(run: Run, scores: ImportanceScores, rows: list[assets.Row], steps: int) -> dict[str, Any]:
    """Runs step (d): new adapters with the same number of parameters on three choices of modules."""
    console.rule("(d) the setting on another task")
    configs = equal_configs(run.base(), run.output / "setting", scores)
    test, training = Dataset.from_list(rows[:NUM_TASK_HELD_OUT]), Dataset.from_list(rows[NUM_TASK_HELD_OUT:])
    tokenizer = run.tokenizer
    labels = tuple(tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in ("negative", "positive"))
    results: dict[str, Any] = {}
    for name, lora in configs.items():
        model = get_peft_model(run.base(), lora)
        trainer = run.trainer(model, steps, training, test=test)
        batches = trainer.get_eval_dataloader("test")
        if not results:
            with model.disable_adapter():
                results["base model"] = {**evaluate(model, batches, "base model", labels), "r": 0, "parameters": 0}
        trainer.train()
        figures = {"r": lora.r, "parameters": num_adapter_parameters(model)}
        results[name] = {**evaluate(model, batches, name, labels), **figures}
    return results


def table(title: str, results: dict[str, dict[str, Any]], formats: dict[str, str]) -> Table:
    """Returns a table with one row per model; missing figures are left empty."""
    built = Table("", title=title)
    for column in formats:
        built.add_column(column, justify="right")
    for name, figures in results.items():
        built.add_row(name, *(format(figures[key], form) if figures[key] else "" for key, form in formats.items()))
    return built


def compare(run: Run, steps: int, task_steps: int) -> None:
    """Runs the four steps and prints the results.

    Args:
        run: the settings of all runs.
        steps: number of training steps of (a).
        task_steps: number of training steps of each run of (d).
    """
    started = time.perf_counter()
    needed = NUM_HELD_OUT + NUM_CALIBRATION + steps * BATCH_SIZE
    scores, definitions = find_setting(run, Dataset.from_list(assets.glosses()[:needed]), steps)
    reviews = assets.sentiment()[: NUM_TASK_HELD_OUT + task_steps * BATCH_SIZE]
    sentiment = use_setting(run, scores, reviews, task_steps)

    answer = definitions.pop("sample")
    title = f"Loss on {NUM_HELD_OUT} held-out instructions, without retraining after pruning"
    console.print(table(title, definitions, {"loss": ".3f", "parameters": ",", "file": ""}))
    title = f"Sentiment of {NUM_TASK_HELD_OUT} held-out reviews after {task_steps} steps, with a new adapter each"
    console.print(table(title, sentiment, {"accuracy": ".3f", "loss": ".3f", "r": "", "parameters": ","}))
    console.print(f"[bold]{answer}[/bold]\n(the exported plain LoRA gives the same answer without this package)")
    results = {"seed": run.seed, "steps": steps, "task_steps": task_steps, "sample": answer}
    content = json.dumps({**results, "instructions": definitions, "sentiment": sentiment}, indent=2)
    (run.output / "results.json").write_text(content + "\n")
    console.print(f"The results are in {run.output}/. Total time: {(time.perf_counter() - started) / 60:.1f} minutes.")
