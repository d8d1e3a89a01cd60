"""The loss of a gated model on a calibration batch, from which scores are computed."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .gates import Gates


Batch = Mapping[str, Any]


class GatedLoss:
    """The loss of a gated model on one batch, as a function of the gates.

    Args:
        model: the base model with its LoRA layers.
        gates: the gates of the scored modules.
        batch: the arguments of the model's forward, including labels.
        number: the batch's position in the calibration data, for errors.

    Attributes:
        label_mask: where the batch has label tokens, see `label_mask`.
        num_tokens: the number of label tokens.
    """

    def __init__(self, model: nn.Module, gates: Gates, batch: Batch, number: int = 0) -> None:
        self.model = model
        self.gates = gates
        self.batch = batch
        self.number = number
        self.label_mask = label_mask(model, batch)
        self.num_tokens = int(self.label_mask.sum())

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy at gates g, summed over the batch's label tokens, in float32.

        Args:
            values: g, shape (M,).

        Raises:
            ValueError: the loss is infinite or NaN.
        """
        self.gates.set(values)
        loss = self.model(**self.batch).loss.float() * self.num_tokens
        if not torch.isfinite(loss):
            raise ValueError(
                f"The calibration loss of batch {self.number} is {loss.item()}, so no module can be scored. Check the "
                "labels of that batch and the dtype of the model: float16 may overflow where bfloat16 and float32 do not."
            )
        return loss

    def gradient(self, value: float) -> torch.Tensor:
        """Returns ∂L/∂g at g = value · 1, summed over the batch's label tokens, shape (M,), in float64 on the CPU."""
        values = torch.full((len(self.gates),), value, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self(values), values)
        return gradient.double()


def label_mask(model: Any, batch: Batch) -> torch.Tensor:
    """Returns which entries count in the model's loss, as a bool tensor in the shape of the labels.

    A causal model predicts label t+1 at token t, so the mask is shifted to the predicting tokens.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.get("labels") is None:
        raise ValueError(
            f"The calibration batch has no `labels`, only {sorted(map(str, batch))}, but scores are computed from the "
            "loss. Use the data collator of your trainer, or DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    counted = batch["labels"] != -100
    if hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder:
        tokens = batch.get("input_ids")
        if counted.ndim < 2 or (tokens is not None and counted.shape[:2] != tokens.shape[:2]):
            shape = "" if tokens is None else f", but `input_ids` {tuple(tokens.shape)}"
            raise ValueError(
                f"`labels` of a calibration batch has the shape {tuple(counted.shape)}{shape}: a causal model needs "
                "one label per token, -100 for tokens without a loss."
            )
        counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
    return counted
