"""Training arguments and the loss on held-out rows, shared by the examples."""

from pathlib import Path
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer


BATCH_SIZE = 8


def run_arguments(
    output: Path, steps: int, learning_rate: float, seed: int = 42, batch_size: int = BATCH_SIZE
) -> dict[str, Any]:
    """Returns the arguments of a short run of any of TRL's trainers that writes no checkpoints.

    Args:
        output: output folder of the example.
        steps: number of training steps, with a warmup of 6%.
        learning_rate: peak learning rate.
        seed: seed of the data order.
        batch_size: rows per step.
    """
    return {
        "output_dir": str(output / "trainer"),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": max(1, round(0.06 * steps)),
        "max_length": 128,
        "gradient_checkpointing": False,  # not needed for a small model, and takes a third more time
        "bf16": torch.cuda.is_available(),  # emulated and slow on most CPUs
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "seed": seed,
    }


def sft_arguments(
    output: Path, steps: int, learning_rate: float, seed: int = 42, batch_size: int = BATCH_SIZE
) -> SFTConfig:
    """Returns `run_arguments` for `SFTTrainer`."""
    return SFTConfig(**run_arguments(output, steps, learning_rate, seed, batch_size))


@torch.no_grad()
def held_out_loss(trainer: SFTTrainer) -> float:
    """Returns the loss of a trainer's model on its evaluation data, in nats per label token."""
    trainer.model.eval()
    total, count = 0.0, 0
    for batch in trainer.get_eval_dataloader():
        labels = int((batch["labels"][:, 1:] != -100).sum())
        total += trainer.model(**batch).loss.item() * labels
        count += labels
    return total / count
