"""What a model is scored on, and the state that it is in meanwhile."""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraModel
from torch import nn


@contextmanager
def inference_state(tuner: LoraModel, adapter_name: str) -> Iterator[None]:
    """The model in eval mode with one adapter active and no parameter to train, and everything as before afterwards."""
    training = [(module, module.training) for module in tuner.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    active = tuner.active_adapter
    devices = {parameter.device for parameter in tuner.parameters() if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            tuner.set_adapter(adapter_name)
            tuner.requires_grad_(False)
            tuner.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        tuner.set_adapter(active)
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad = flag


_LOADER = (
    "pass DataLoader(rows, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)), or what your "
    "trainer's get_eval_dataloader() returns."
)


def prepared(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Moves a batch to the model's device, and switches the KV cache off where the model has one.

    Raises:
        ValueError: the batch is not a dict of tensors with labels for its rows.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The dataloader gave a {type(batch).__name__} instead of a dict of the forward's arguments; use the data "
            "collator of your trainer. A single batch goes into a list: score_modules([batch])."
        )
    _check_tensors(batch)
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", False):
        moved.setdefault("use_cache", False)
    return moved


def _check_tensors(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        value = batch.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"`{name}` of a calibration batch is a {type(value).__name__} instead of a tensor, as in a row of a dataset "
                f"or a batch that was not collated: {_LOADER}"
            )
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if tokens is None or labels is None:
        return
    if tokens.ndim < 2:
        raise ValueError(
            f"`input_ids` of a calibration batch has the shape {tuple(tokens.shape)}, that of a single row; batches have "
            f"rows and tokens: {_LOADER}"
        )
    if labels.ndim == 0 or len(labels) != len(tokens):
        raise ValueError(
            f"`labels` of a calibration batch has the shape {tuple(labels.shape)}, but `input_ids` has {len(tokens)} rows: "
            "each row needs its own labels."
        )
