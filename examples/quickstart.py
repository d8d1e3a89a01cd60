"""All four steps of FanLoRA on a real chat model and real text, in under ten minutes on two CPU cores.

(a) LoRA on every linear layer, trained on WordNet definitions; (b) a score for each module; (c) the best two of each
layer stay: the FanLoRA setting; (d) a fresh adapter on that setting learns another task, the sentiment of movie
reviews, beside LoRA on all layers and on Q and V at the same number of parameters.

    python examples/quickstart.py
    python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/tldr
"""

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import assets
import torch
import typer
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from peft_fanlora import FanLoraConfig, FanLoraSetting, export_lora


MODULES_PER_LAYER = 2
NUM_HELD_OUT = 64
NUM_CALIBRATION = 16
NUM_TASK_HELD_OUT = 160
BATCH_SIZE = 8
RANDOM_DRAWS = 3
RANK_OF_LORA_ON_ALL = 3

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


def sft_trainer(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, output: Path, steps: int, rate: float, **data: Any
) -> SFTTrainer:
    """Makes TRL's trainer with the settings that all runs here share."""
    arguments = SFTConfig(
        output_dir=str(output / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=BATCH_SIZE,
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=max(1, round(0.06 * steps)),
        max_length=128,
        gradient_checkpointing=False,  # saves memory that this model does not need, for a third more time
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),  # emulated, and so slow, on most CPUs
        use_cpu=not torch.cuda.is_available(),
    )
    return SFTTrainer(model, args=arguments, processing_class=tokenizer, **data)


@torch.no_grad()
def label_loss(model: torch.nn.Module, dataloader: DataLoader, description: str) -> float:
    """Returns the mean cross-entropy over all label tokens, in nats a token."""
    model.eval()
    total, num_tokens = 0.0, 0
    for batch in tqdm(dataloader, desc=description, leave=False):
        counted = int((batch["labels"][:, 1:] != -100).sum())
        total += model(**batch).loss.item() * counted
        num_tokens += counted
    return total / num_tokens


@torch.no_grad()
def accuracy(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[assets.Row]) -> float:
    """Returns how often the right one of the two labels is the more likely answer."""
    model.eval()
    tokenizer.padding_side = "left"
    first_tokens = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in ("negative", "positive")]
    right = 0
    for start in tqdm(range(0, len(rows), BATCH_SIZE), desc="accuracy", leave=False):
        part = rows[start : start + BATCH_SIZE]
        prompts = [
            tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True) for row in part
        ]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        positive = model(**inputs).logits[:, -1, first_tokens].argmax(dim=-1).bool().tolist()
        right += sum(
            row["completion"][0]["content"] == "positive" for row, yes in zip(part, positive, strict=True) if yes
        )
        right += sum(
            row["completion"][0]["content"] == "negative" for row, yes in zip(part, positive, strict=True) if not yes
        )
    return right / len(rows)


def num_adapter_parameters(model: PeftModel) -> int:
    return sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)


def folder_size(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1e6:.1f} MB"


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    dataset: Annotated[str, typer.Option(help="Hub id of a prompt-completion data set [default: WordNet]")] = "",
    output: Annotated[Path, typer.Option(help="Where the results go")] = Path("quickstart-output"),
    steps: Annotated[int, typer.Option(help="Training steps of (a)")] = 50,
    task_steps: Annotated[int, typer.Option(help="Training steps of each run of (d)")] = 30,
    seed: Annotated[int, typer.Option(help="Seed of all runs")] = 0,
) -> None:
    """Runs the four steps and prints what they gain."""
    started = time.perf_counter()
    console = Console()
    output.mkdir(parents=True, exist_ok=True)
    base_folder = model or str(assets.model_folder())
    tokenizer = AutoTokenizer.from_pretrained(base_folder)

    def base() -> PreTrainedModel:
        set_seed(seed)
        return AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)

    needed = NUM_HELD_OUT + NUM_CALIBRATION + steps * BATCH_SIZE
    if dataset:
        instructions = load_dataset(dataset, split="train").shuffle(seed=seed).select(range(needed))
    else:
        instructions = Dataset.from_list(assets.glosses()[:needed])
    held_out = instructions.select(range(NUM_HELD_OUT))
    calibration = instructions.select(range(NUM_HELD_OUT, NUM_HELD_OUT + NUM_CALIBRATION))
    training = instructions.select(range(NUM_HELD_OUT + NUM_CALIBRATION, needed))

    console.rule("(a) LoRA on all linear layers")
    peft_model = get_peft_model(base(), FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    peft_model.print_trainable_parameters()
    data = {"train_dataset": training, "eval_dataset": {"held_out": held_out, "calibration": calibration}}
    trainer = sft_trainer(peft_model, tokenizer, output, steps, 1e-3, **data)
    test_batches = trainer.get_eval_dataloader("held_out")
    with peft_model.disable_adapter():
        losses = {"base model": (label_loss(peft_model, test_batches, "base model"), 0, "")}
    trainer.train()
    peft_model.save_pretrained(output / "all-modules")
    losses["LoRA on all modules"] = (
        label_loss(peft_model, test_batches, "all modules"),
        num_adapter_parameters(peft_model),
        folder_size(output / "all-modules"),
    )

    console.rule("(b) a score for each module")
    scores = peft_model.score_modules(trainer.get_eval_dataloader("calibration"), method="path")

    console.rule(f"(c) the best {MODULES_PER_LAYER} modules of each layer")
    setting = peft_model.prune_modules(scores.select(modules_per_layer=MODULES_PER_LAYER))
    console.print(str(setting), highlight=False)
    scores.plot(output / "importance.png", setting)
    setting.save_pretrained(output / "setting")
    peft_model.save_pretrained(output / "adapter")
    export_lora(peft_model, output / "plain-lora")
    parameters, size = num_adapter_parameters(peft_model), folder_size(output / "adapter")
    losses["pruned by score"] = (label_loss(peft_model, test_batches, "by score"), parameters, size)
    names_by_layer: dict[str, list[str]] = {}
    for name in scores:
        names_by_layer.setdefault(name.rpartition(".layers.")[2].split(".")[0], []).append(name)
    for draw in range(RANDOM_DRAWS):
        rng = random.Random(draw)
        names = [name for names in names_by_layer.values() for name in rng.sample(names, MODULES_PER_LAYER)]
        randomly = AutoPeftModelForCausalLM.from_pretrained(output / "all-modules")
        randomly.prune_modules(FanLoraSetting.from_modules(randomly.get_base_model(), names))
        loss = label_loss(randomly, test_batches, f"at random, draw {draw + 1}")
        losses[f"pruned at random, draw {draw + 1}"] = (loss, num_adapter_parameters(randomly), "")

    question = instructions[0]["prompt"]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    peft_model.eval()
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(peft_model.device)
    generated = peft_model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    command = [sys.executable, "-c", PLAIN_PEFT, base_folder, str(output / "plain-lora"), prompt]
    plain_answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if plain_answer != answer.strip():
        raise RuntimeError(f"the exported adapter answers {plain_answer!r}, the original {answer.strip()!r}")

    console.rule("(d) the setting on another task")
    rows = assets.sentiment()[: NUM_TASK_HELD_OUT + task_steps * BATCH_SIZE]
    task_test, task_training = rows[:NUM_TASK_HELD_OUT], Dataset.from_list(rows[NUM_TASK_HELD_OUT:])
    untrained = base()
    on_all = FanLoraSetting.from_modules(untrained, scores)
    on_q_v = FanLoraSetting.from_modules(untrained, [name for name in scores if name.endswith(("q_proj", "v_proj"))])
    budget = num_adapter_parameters(
        get_peft_model(base(), LoraConfig(r=RANK_OF_LORA_ON_ALL, target_modules=on_all.names))
    )
    configs: dict[str, LoraConfig] = {}
    for name, choice in {"FanLoRA": setting, "LoRA, all linear layers": on_all, "LoRA, Q and V": on_q_v}.items():
        rank = choice.rank_for_budget(untrained, budget)
        common = {"r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM"}
        is_fanlora = name == "FanLoRA"
        configs[name] = (
            FanLoraConfig(setting=str(output / "setting"), **common)
            if is_fanlora
            else LoraConfig(target_modules=choice.names, **common)
        )
    task = {"base model": (accuracy(untrained, tokenizer, task_test), float("nan"), 0, 0)}
    for name, config in configs.items():
        task_model = get_peft_model(base(), config)
        tuner = sft_trainer(
            task_model,
            tokenizer,
            output,
            task_steps,
            1e-3,
            train_dataset=task_training,
            eval_dataset=Dataset.from_list(task_test),
        )
        tuner.train()
        loss = label_loss(task_model, tuner.get_eval_dataloader(), name)
        task[name] = (accuracy(task_model, tokenizer, task_test), loss, config.r, num_adapter_parameters(task_model))

    report(console, losses, task, question[-1]["content"], answer.strip())
    results = {"seed": seed, "steps": steps, "task_steps": task_steps, "definitions": losses, "sentiment": task}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    console.print(f"Everything is in {output}/. It took {(time.perf_counter() - started) / 60:.1f} minutes.")


def report(
    console: Console,
    losses: dict[str, tuple[float, int, str]],
    task: dict[str, tuple[float, float, int, int]],
    question: str,
    answer: str,
) -> None:
    """Prints the two tables and the sample."""
    table = Table(title=f"Definitions: loss on {NUM_HELD_OUT} held-out ones, nothing retrained after pruning")
    for column in ("", "nats a token", "parameters", "file"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (loss, parameters, size) in losses.items():
        table.add_row(name, f"{loss:.3f}", f"{parameters:,}" if parameters else "", size)
    console.print(table)

    table = Table(title=f"Sentiment: a fresh adapter each, {NUM_TASK_HELD_OUT} held-out reviews")
    for column in ("", "accuracy", "nats a token", "r", "parameters"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (right, loss, rank, parameters) in task.items():
        trained = (f"{loss:.3f}", str(rank), f"{parameters:,}") if parameters else ("", "", "")
        table.add_row(name, f"{right:.3f}", *trained)
    console.print(table)
    console.print(f"{question}\n[bold]{answer}[/bold]\n(the exported plain LoRA, loaded without this package, agrees)")


if __name__ == "__main__":
    typer.run(main)
