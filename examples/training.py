"""Training arguments and losses on held-out rows, shared by the examples."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
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


@dataclass(frozen=True)
class Losses:
    """The losses of a model on held-out rows.

    Attributes:
        nats: the summed loss of each row's label tokens, (rows,).
        tokens: the number of each row's label tokens, (rows,).
        right: whether the most likely of the `choices` is the row's first answer token, (rows,).
    """

    nats: torch.Tensor
    tokens: torch.Tensor
    right: torch.Tensor

    @property
    def mean(self) -> float:
        """The loss in nats per label token."""
        return float(self.nats.sum() / self.tokens.sum())

    @property
    def accuracy(self) -> float:
        return float(self.right.float().mean())

    def minus(self, *others: "Losses") -> tuple[float, float]:
        """Returns the difference to the mean of other models on the same rows, and half of its 95% interval.

        The interval is that of the rows, by the linearized variance of a ratio; it does not include the training seed.
        """
        gaps = self.nats - torch.stack([other.nats for other in others]).mean(0)
        gap, rows = gaps.sum() / self.tokens.sum(), len(gaps)
        spread = (gaps - gap * self.tokens).square().sum() * rows / (rows - 1)
        return float(gap), float(1.96 * spread.sqrt() / self.tokens.sum())


@torch.no_grad()
def losses(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]], choices: tuple[int, ...] = ()) -> Losses:
    """Returns the losses of a model on the batches of a trainer's data loader.

    Args:
        model: the model.
        batches: the batches.
        choices: tokens. An answer is right if its first token is the most likely one of them.
    """
    model.eval()
    found = []
    for batch in batches:
        labels = batch["labels"][:, 1:]
        counted = labels != -100
        logits = model(**batch).logits[:, :-1]
        row = torch.arange(len(labels), device=labels.device)
        nats = nn.functional.cross_entropy(logits[counted].float(), labels[counted], reduction="none")
        summed = nats.new_zeros(len(labels)).index_add(0, row.repeat_interleave(counted.sum(1)), nats)
        right = torch.zeros_like(row, dtype=torch.bool)
        if choices:
            first = counted.int().argmax(1)
            likeliest = logits[row, first][:, choices].argmax(1)
            right = labels.new_tensor(choices)[likeliest] == labels[row, first]
        found.append((summed.cpu(), counted.sum(1).cpu(), right.cpu()))
    return Losses(*map(torch.cat, zip(*found, strict=True)))


def held_out_loss(trainer: SFTTrainer) -> float:
    """Returns the loss of a trainer's model on its evaluation data, in nats per label token."""
    return losses(trainer.model, trainer.get_eval_dataloader()).mean
