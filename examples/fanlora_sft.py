"""FanLoRA with TRL: one training run finds the setting, and a new adapter on it learns another task.

FanLoraCallback scores and prunes the modules in the middle of the run on instructions, steps (a) to (c). The adapter of
the task is then trained on the setting that it found, step (d). `quickstart.py --full` runs the steps one by one and
compares them with alternatives.

    python examples/fanlora_sft.py
    python examples/fanlora_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/tldr
"""

from pathlib import Path
from typing import Annotated, Any

import assets
import torch
import typer
from datasets import Dataset, load_dataset
from peft import PeftModel, get_peft_model
from rich.console import Console
from training import BATCH_SIZE, held_out_loss, sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTTrainer

from peft_fanlora import FanLoraCallback, FanLoraConfig, FanLoraSetting, export_lora


NUM_CALIBRATION = 16
NUM_HELD_OUT = 64

console = Console()


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    dataset: Annotated[str, typer.Option(help="Hub id of a prompt-completion data set [default: WordNet]")] = "",
    output: Annotated[Path, typer.Option(help="Output folder")] = Path("fanlora-output"),
    steps: Annotated[int, typer.Option(help="Training steps of (a) to (c)")] = 40,
    task_steps: Annotated[int, typer.Option(help="Training steps of (d)")] = 20,
    keep: Annotated[int, typer.Option(help="Number of modules per layer to keep")] = 2,
    parameters: Annotated[
        int, typer.Option(help="Approximate number of parameters of the task's adapter")
    ] = 1_200_000,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Finds a setting and uses it."""
    base_model = model or str(assets.model_folder())
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    needed = NUM_HELD_OUT + NUM_CALIBRATION + steps * BATCH_SIZE
    if dataset:
        instructions = load_dataset(dataset, split="train").shuffle(seed=seed).select(range(needed))
    else:
        instructions = Dataset.from_list(assets.glosses()[:needed])
    reviews = Dataset.from_list(assets.sentiment()[: NUM_HELD_OUT + task_steps * BATCH_SIZE])

    def adapter(config: FanLoraConfig) -> PeftModel:
        set_seed(seed)
        return get_peft_model(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), config)

    def train(adapted: PeftModel, rows: Dataset, steps: int, **options: Any) -> SFTTrainer:
        trainer = SFTTrainer(
            adapted,
            args=sft_arguments(output, steps, learning_rate=1e-3, seed=seed),
            processing_class=tokenizer,
            train_dataset=rows.select(range(NUM_HELD_OUT, len(rows))),
            eval_dataset=rows.select(range(NUM_HELD_OUT)),
            **options,
        )
        before = held_out_loss(trainer)
        trainer.train()
        console.print(f"Held-out loss {before:.3f} -> {held_out_loss(trainer):.3f}", highlight=False)
        return trainer

    console.rule("(a) to (c): LoRA on all modules, from the middle of the run only on the best")
    calibration = instructions.select(range(NUM_CALIBRATION))
    instructions = instructions.select(range(NUM_CALIBRATION, len(instructions)))
    callback = FanLoraCallback(calibration, prune_at=0.5, keep=keep)
    train(adapter(FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM")), instructions, steps, callbacks=[callback])
    callback.setting.save_pretrained(output / "setting")
    callback.scores.plot(output / "importance.png", callback.setting)
    console.print(str(callback.setting), highlight=False)

    console.rule("(d) a new adapter on the setting: the sentiment of movie reviews")
    setting = FanLoraSetting.from_pretrained(output / "setting")
    rank = setting.rank_for_budget(AutoModelForCausalLM.from_pretrained(base_model), parameters)
    tuned = adapter(FanLoraConfig(setting=setting, r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"))
    tuned.print_trainable_parameters()
    train(tuned, reviews, task_steps)
    tuned.save_pretrained(output / "adapter")
    export_lora(tuned, output / "plain-lora")
    console.print(f"The setting, the adapter and its export as plain LoRA are in {output}/.")


if __name__ == "__main__":
    typer.run(main)
