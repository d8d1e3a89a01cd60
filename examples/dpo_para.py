"""PARA with TRL's DPOTrainer: the model learns to prefer the right one of two definitions of a word.

The reference model is the base model, i.e. the same model with disabled adapter. TRL's labels show PARA where each prompt
ends, so that nothing has to be configured.

    python examples/dpo_para.py
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated

import assets
import torch
import typer
from datasets import Dataset
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from training import run_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer

from peft_fanlora import ParaConfig


NUM_HELD_OUT = 32
BATCH_SIZE = 4

console = Console()


def preferences(number: int) -> Dataset:
    """Returns rows with a question, the right definition and the definition of the next word."""
    rows = assets.glosses()[: number + 1]
    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": other["completion"]}
            for row, other in pairwise(rows)
        ]
    )


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    output: Annotated[Path, typer.Option(help="Output folder for the adapter")] = Path("dpo-output"),
    steps: Annotated[int, typer.Option(help="Training steps")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Trains PARA on preferences."""
    base_model = model or str(assets.model_folder())
    set_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    adapted = get_peft_model(base, ParaConfig(task_type="CAUSAL_LM"))
    rows = preferences(NUM_HELD_OUT + steps * BATCH_SIZE)
    trainer = DPOTrainer(
        adapted,
        args=DPOConfig(**run_arguments(output, steps, learning_rate, seed, BATCH_SIZE)),
        processing_class=AutoTokenizer.from_pretrained(base_model),
        train_dataset=rows.select(range(NUM_HELD_OUT, len(rows))),
        eval_dataset=rows.select(range(NUM_HELD_OUT)),
    )
    trainer.train()
    after = trainer.evaluate()
    adapted.save_pretrained(output / "adapter")
    table = Table("", "", title=f"{NUM_HELD_OUT} held-out pairs (untrained adapter: loss ln 2, margin 0)")
    for name in ("loss", "rewards/accuracies", "rewards/margins"):
        table.add_row(name, f"{after[f'eval_{name}']:.3f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
