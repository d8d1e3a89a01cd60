"""Training, resuming and saving under DeepSpeed ZeRO in two processes, compared with one process without it.

`make test-deepspeed` runs these tests in an environment that has DeepSpeed.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from integration_tests.distributed import scenarios, zero
from integration_tests.distributed.scenarios import close
from integration_tests.helpers.models import TINY
from integration_tests.helpers.processes import environment


pytest.importorskip("deepspeed")

HERE = Path(__file__).parent
ADAPTER = "adapter_model.safetensors"
ALL_RUNS = [(stage, name) for stage in zero.STAGES for name in zero.RUNS] + [(3, name) for name in zero.OF_CONV1D]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs of two processes."""
    folder = tmp_path_factory.mktemp("two")
    zero.prepare(folder / "bases")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    launched = subprocess.run(
        [*launch, str(HERE / "zero.py"), str(folder)],
        env=environment(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES=""),
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert launched.returncode == 0, f"{launched.stdout}\n{launched.stderr}"[-6000:]
    return folder


@pytest.fixture(scope="module")
def one(two: Path) -> Any:
    """Runs in this process, without DeepSpeed, each once."""
    found: dict[str, Any] = {}

    def reference(name: str) -> Any:
        if name not in found:
            found[name] = zero.trained(name, two / "one" / name, None, two / "bases")
        return found[name]

    return reference


def of_both(two: Path, *key: Any) -> list[Any]:
    return [torch.load(two / f"rank-{rank}.pt", weights_only=False)[key] for rank in range(2)]


@pytest.mark.parametrize(("stage", "name"), ALL_RUNS)
def test_training_is_that_of_one_process(stage: int, name: str, two: Path, one: Any) -> None:
    """Also with weights that stage 3 has divided, the base model's among them, since it is loaded."""
    losses = one(name)["losses"]
    for found in of_both(two, stage, name):
        assert found["losses"] == pytest.approx(losses, abs=1e-5)
    saved, expected = (
        load_file(folder / name / "checkpoint-6" / ADAPTER) for folder in (two / f"{stage}", two / "one")
    )
    close(saved, expected, 1e-4)
    before = load_file(two / f"{stage}" / name / "checkpoint-3" / ADAPTER)
    assert any(float((tensor - before[key]).abs().max()) > 1e-3 for key, tensor in saved.items())


@pytest.mark.parametrize("name", zero.RUNS)
@pytest.mark.parametrize("stage", zero.STAGES)
def test_resuming(stage: int, name: str, two: Path) -> None:
    whole, resumed = (two / folder / name / "checkpoint-6" / ADAPTER for folder in (f"{stage}", f"{stage} resumed"))
    close(load_file(resumed), load_file(whole), 1e-6)


@pytest.mark.parametrize("method", scenarios.METHODS)
def test_weights_that_are_divided_are_saved_whole_or_not_at_all(method: str, two: Path) -> None:
    """Guards against PARA adapters without weights, saved without a word."""
    for refusals in of_both(two, method, "refusals"):
        assert "GatheredParameters" in refusals["save"]
    folder = two / "refused" / method
    assert not list(folder.glob("rank-*/saved"))
    close(load_file(folder / "gathered" / ADAPTER), load_file(folder / "checkpoint-6" / ADAPTER), 0)
    PeftModel.from_pretrained(TINY["llama"].base(), folder / "gathered")


def test_what_reads_divided_weights_is_refused(two: Path) -> None:
    """Guards against scores of nothing: the norm of an empty weight is zero."""
    for refusals in of_both(two, "FanLoRA", "refusals"):
        assert refusals.keys() == {"save", "score", "score weights", "prune", "export"}
        for name in ("score", "score weights", "prune"):
            assert "sharded over processes, as by FSDP or DeepSpeed ZeRO-3" in refusals[name]
        assert "DeepSpeed ZeRO-3" in refusals["export"]
    assert not list((two / "refused" / "FanLoRA").glob("rank-*/exported"))


@pytest.mark.parametrize("stage", zero.STAGES)
def test_the_callback_is_refused(stage: int, two: Path) -> None:
    assert all("cannot prune under FSDP" in refusal for refusal in of_both(two, stage, "callback"))


@pytest.mark.parametrize("method", scenarios.METHODS)
def test_calls_of_a_divided_model(method: str, two: Path) -> None:
    expected = zero.served(method, None, two / "bases")
    for found in of_both(two, method, "served"):
        torch.testing.assert_close(found["logits"], expected["logits"], atol=1e-5, rtol=1e-5)
        assert torch.equal(found["sequences"], expected["sequences"])


@pytest.mark.parametrize("method", scenarios.METHODS)
def test_mixed_batches_of_a_divided_model_are_refused(method: str, two: Path) -> None:
    """Guards against processes that gather different adapters at the same time: each would get half of both."""
    for found in of_both(two, method, "served"):
        assert "Cannot pass `adapter_names` to a model sharded by DeepSpeed ZeRO-3" in found["refusal"]
