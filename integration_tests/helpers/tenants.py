"""Three FanLoRA tenants of one model, and the comparison of a mixed batch's rows with what each adapter alone gives."""

from typing import Any

import torch
from peft import PeftModel

from integration_tests.helpers.models import TINY, fanlora, randomize
from peft_fanlora import FanLoraConfig
from peft_fanlora.serving.tenants import BASE_ROWS


NAMES = ["two", BASE_ROWS, "default", "three", "default", "two", "default"]


def tenants(architecture: str = "llama", **kwargs: Any) -> PeftModel:
    """Three tenants of different ranks, scales and modules."""
    model = fanlora(architecture, **kwargs)
    few = {"llama": ["v_proj", "down_proj"], "gpt2": ["c_attn"], "t5": ["v", "wo"], "bert": ["value"]}.get(
        architecture
    )
    few = few or ["v_proj", "k_proj"]
    task_type = TINY[architecture].task_type
    model.add_adapter("two", FanLoraConfig(r=6, lora_alpha=5, target_modules=few, task_type=task_type))
    pattern = {few[0]: 3}
    model.add_adapter(
        "three", FanLoraConfig(r=2, rank_pattern=pattern, use_rslora=True, task_type=task_type, lora_dropout=0.5)
    )
    randomize(model, std=0.2)
    return model.eval()


def alone(model: PeftModel, batch: dict[str, torch.Tensor], row: int, name: str, by_peft: bool = True) -> torch.Tensor:
    """Returns the logits of a row by the adapter alone, on PEFT's own path, which all calls with gradients take."""
    own = {key: value[row : row + 1] for key, value in batch.items()}
    with torch.set_grad_enabled(by_peft):
        if name == BASE_ROWS:
            with model.disable_adapter():
                return model(**own).logits[0].detach()
        before = model.active_adapter
        model.set_adapter(name)
        found = model(**own).logits[0].detach()
        model.set_adapter(before)
        return found


def check_rows(model: PeftModel, names: list[str] = NAMES, tolerance: float = 1e-5, **kwargs: Any) -> None:
    """Compares each row of a mixed batch, and of an inference without names, with what PEFT's path gives."""
    architecture = model.base_model.model.config.model_type
    batch = TINY[architecture].batch(rows=len(names), **kwargs)
    with torch.no_grad():
        mixed = model(**batch, adapter_names=names).logits
    for row, name in enumerate(names):
        expected = alone(model, batch, row, name)
        for found in (mixed[row], alone(model, batch, row, name, by_peft=False)):
            assert (found - expected).abs().max() < tolerance * max(1, expected.abs().max()), (row, name)
