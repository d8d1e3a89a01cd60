"""Adapters made to do harm: nothing in them is run, and what they claim to be does not decide what is allocated."""

import json
import pickle
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from integration_tests.helpers.models import METHODS, adapted, logits, tiny
from peft_fanlora import load_tenant


both = pytest.mark.parametrize("method", METHODS)


class Harmful:
    """What is unpickled as a call of any function."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def ways(method: str, folder: Path, **options: Any) -> list[Any]:
    host = adapted(method)
    return [
        lambda: PeftModel.from_pretrained(tiny("llama"), folder, **options),
        lambda: host.load_adapter(folder, "guest", **options),
        lambda: load_tenant(host, folder, "guest", **options),
    ]


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@both
def test_code_in_pickled_weights_is_not_run(method: str, form: str, tmp_path: Path) -> None:
    adapted(method).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    weights, touched = tmp_path / "adapter_model.bin", tmp_path / "touched"
    if form == "pickle":
        weights.write_bytes(pickle.dumps(Harmful(touched)))
    else:
        torch.save({"weight": Harmful(touched)}, weights)
    for load in ways(method, tmp_path):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            load()
    assert not touched.exists()
    if form == "torch.save":
        torch.load(weights, weights_only=False)
        assert touched.exists()  # as it would be


@both
def test_a_claimed_rank_is_not_allocated_where_the_weights_are_loaded_first(method: str, tmp_path: Path) -> None:
    """With `low_cpu_mem_usage=True` the parameters are made when their values are there."""
    model = adapted(method)
    model.save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "r": 100_000}))  # 170 MB and more
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for load in ways(method, tmp_path, low_cpu_mem_usage=True):
        with pytest.raises(RuntimeError, match="size mismatch"):
            load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@both
def test_weights_that_claim_more_than_the_file_has_are_refused(method: str, tmp_path: Path) -> None:
    """A header of safetensors may promise terabytes, or a length of its own that exceeds the file."""
    adapted(method).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    name, tensor = next(iter(load_file(file).items()))
    size = 2**42
    header = json.dumps({name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    for content in (len(header).to_bytes(8, "little") + header, (2**60).to_bytes(8, "little") + header):
        file.write_bytes(content)
        host = adapted(method)
        before = logits(host)
        for load in (*ways(method, tmp_path), lambda host=host: load_tenant(host, tmp_path, "guest")):
            with pytest.raises(Exception, match=r"deserializing header|InvalidHeader|HeaderTooLarge|Metadata"):
                load()
        assert torch.equal(logits(host), before) and list(host.peft_config) == ["default"]
    assert tensor.numel() < size
