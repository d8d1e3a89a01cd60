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


def prepared(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Moves a batch to the model's device, and switches the KV cache off where the model has one.

    Raises:
        ValueError: the batch is no dict.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The dataloader gave a {type(batch).__name__} instead of a dict of the forward's arguments; use the data "
            "collator of your trainer. A single batch goes into a list: score_modules([batch])."
        )
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", False):
        moved.setdefault("use_cache", False)
    return moved
