"""The loss with the LoRA of some modules alone, computed from the logits and independently of the package."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftModel

from integration_tests.helpers.models import logits
from peft_fanlora.fanlora.candidates import lora_modules


@contextmanager
def only(model: PeftModel, names: set[str]) -> Iterator[None]:
    """Brute force: the LoRA of all other modules is zero."""
    weights = {
        name: layer.lora_B["default"].weight
        for name, layer in lora_modules(model.get_base_model(), "default").items()
        if name not in names
    }
    saved = {name: weight.data.clone() for name, weight in weights.items()}
    for weight in weights.values():
        weight.data.zero_()
    yield
    for name, weight in weights.items():
        weight.data.copy_(saved[name])


def loss_of(model: PeftModel, batches: list[dict[str, torch.Tensor]], names: set[str]) -> float:
    """The mean over label tokens, computed from the logits and independently of the package."""
    total, count = 0.0, 0
    with only(model, names):
        for batch in batches:
            output, labels = logits(model, batch), batch["labels"]
            if model.peft_config["default"].task_type == "CAUSAL_LM":
                output, labels = output[:, :-1], labels[:, 1:]
            flat = labels.reshape(-1)
            total += torch.nn.functional.cross_entropy(
                output.reshape(len(flat), -1), flat, ignore_index=-100, reduction="sum"
            ).item()
            count += int((flat != -100).sum())
    return total / count
