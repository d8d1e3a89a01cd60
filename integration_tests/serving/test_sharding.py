"""Weights that DeepSpeed ZeRO-3 has divided among processes, as it leaves them between two forward passes.

`integration_tests/distributed/test_deepspeed.py` runs DeepSpeed itself.
"""

from pathlib import Path

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from integration_tests.helpers.models import METHODS, adapted, fanlora, tokens
from peft_fanlora.fanlora.candidates import num_parameters_per_rank
from peft_fanlora.para.targets import linear_shape


both = pytest.mark.parametrize("method", METHODS)


def divide(parameter: torch.nn.Parameter) -> None:
    parameter.ds_id = 0
    parameter.data = torch.empty(0)


@both
def test_empty_weights_are_not_saved(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    divide(next(parameter for parameter in model.parameters() if parameter.requires_grad))
    with pytest.raises(ValueError, match=r"adapter 'default' are sharded .* is empty here"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@both
def test_mixed_batches_are_refused(method: str) -> None:
    model = adapted(method)
    next(model.parameters()).ds_id = 0
    with pytest.raises(ValueError, match="sharded by DeepSpeed ZeRO-3"):
        model(input_ids=tokens(1), adapter_names=["default"])


@pytest.mark.parametrize("score", ["path", "weight_norm"])
def test_empty_weights_are_not_scored(score: str) -> None:
    """Guards against a score of zero, the norm of nothing."""
    model = fanlora()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            divide(parameter)
    with pytest.raises(ValueError, match="sharded over processes"):
        model.score_modules([], score, progress=False)


def test_the_size_of_a_layer_is_not_that_of_its_weight() -> None:
    layer = Conv1D(3, 2)
    divide(layer.weight)
    assert linear_shape(layer) == (2, 3)
    assert num_parameters_per_rank(layer) == 5
