"""Two processes do what one does with the same data: gradients, scores, choices, whole runs and what they save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from integration_tests.distributed import scenarios
from integration_tests.distributed.scenarios import close
from integration_tests.helpers.models import TINY
from integration_tests.helpers.processes import CAN_RESUME_IN_TWO, start_python, variables_of_two
from peft_fanlora import FanLoraSetting


pytestmark = pytest.mark.xdist_group("two_processes")  # one worker makes what its tests share


HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all scenarios, run in two processes that talk over gloo, with the variables that torchrun sets."""
    folder = tmp_path_factory.mktemp("two")
    processes = []
    for rank, variables in enumerate(variables_of_two()):
        output = tmp_path_factory.mktemp(f"output-{rank}")
        processes.append((start_python(output, HERE / "scenarios.py", folder, **variables), output))
    for process, output in processes:
        process.join(600)
        assert process.exitcode == 0, (output / "stderr").read_text()[-6000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs a scenario in this process, once."""
    folder = tmp_path_factory.mktemp("one")
    found: dict[str, Any] = {}

    def reference(name: str) -> Any:
        if name not in found:
            found[name] = scenarios.SCENARIOS[name](folder / name)
        return found[name]

    return reference


can_resume = pytest.mark.skipif(
    not CAN_RESUME_IN_TWO, reason="transformers before 5.18 fails on the optimizer's state of several CPU processes"
)


def of_both(two: Path, name: str) -> list[Any]:
    return [torch.load(two / name / f"rank-{rank}.pt", weights_only=False) for rank in range(2)]


def moved(method: str, weights: dict[str, torch.Tensor]) -> float:
    start = scenarios.values(scenarios.model(method))
    return max(float((value - start[name]).abs().max()) for name, value in weights.items())


@pytest.mark.support("DDP, two processes: gradients")
@pytest.mark.parametrize("method", scenarios.METHODS)
@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "reentrant"])
def test_gradients_under_ddp(method: str, checkpointing: bool | None, two: Path, one: Any) -> None:
    expected = one("gradients")[method, checkpointing]
    assert all(float(gradient.abs().max()) > 0 for gradient in expected.values())
    for found in of_both(two, "gradients"):
        close(found[method, checkpointing], expected)


@pytest.mark.support("FSDP2, two processes: gradients")
@pytest.mark.parametrize("method", scenarios.METHODS)
@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
def test_gradients_under_fsdp2(method: str, checkpointing: bool | None, two: Path, one: Any) -> None:
    for found in of_both(two, "fsdp_gradients"):
        close(found[method, checkpointing], one("fsdp_gradients")[method, checkpointing])


@pytest.mark.support("FSDP2, two processes: train and save")
@pytest.mark.parametrize("method", scenarios.METHODS)
def test_an_adapter_saved_from_a_sharded_model(method: str, two: Path, one: Any) -> None:
    expected = one("fsdp_saved")[method]
    saved = two / "fsdp_saved" / method
    assert [file.name for file in saved.glob("*.safetensors")] == ["adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(TINY["llama"].base(), saved, is_trainable=True)
    close(scenarios.values(loaded), expected, 1e-4)


@pytest.mark.support("FSDP2: scoring and pruning sharded weights", refused=True)
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_sharded_weights_are_neither_scored_nor_pruned(method: str, two: Path) -> None:
    for refusals in of_both(two, "fsdp_refusals"):
        assert refusals.keys() == {"score", "prune"}
        assert all("sharded over processes, as by FSDP" in refusal for refusal in refusals.values())


@pytest.mark.support("scoring in two processes")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("score", ["path", "ablation", "sensitivity", "output_norm", "weight_norm"])
def test_scores_are_those_of_one_process(method: str, score: str, two: Path, one: Any) -> None:
    """Guards against ranks that score their share alone and then choose differently."""
    expected, num_tokens, names = one("scores")[score]
    first, second = of_both(two, "scores")
    assert first == second
    found, tokens, chosen = first[score]
    assert (tokens, chosen) == (num_tokens, names)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.support("DDP, two processes: pruning in the run")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("name", ["fanlora_pruned", "fanlora_pruned_with_best"])
def test_pruning_within_a_distributed_run(method: str, name: str, two: Path, one: Any) -> None:
    expected = one(name)
    first, second = of_both(two, name)
    assert first["setting"] == second["setting"] and first["scores"] == second["scores"]
    close(first["weights"], second["weights"], 0)

    (scores, num_tokens), (found, tokens) = expected["scores"], first["scores"]
    assert tokens == num_tokens  # eleven rows in shares of six and five: none counts twice
    assert found == pytest.approx(scores, rel=1e-3, abs=1e-6)
    assert FanLoraSetting.from_dict(first["setting"]).names == FanLoraSetting.from_dict(expected["setting"]).names
    close(first["weights"], expected["weights"], 1e-4)
    assert first["rates"] == expected["rates"] == pytest.approx([3e-2 * (1 - step / 6) for step in range(6)])
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert first["losses"][-1] < first["losses"][2]

    # what is left, and nothing else, is trained and waited for
    left = 2 * 6
    assert first["is_ddp"] and not expected["is_ddp"]
    assert first["wrapped"] == first["in_optimizer"] == first["with_moments"] == first["trainable"] == left
    assert first["steps"] == [6]  # the moments went on


@pytest.mark.support("DDP, two processes: pruning in the run")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_the_best_checkpoint_of_a_pruned_distributed_run(method: str, two: Path) -> None:
    first, second = of_both(two, "fanlora_pruned_with_best")
    assert first["best"] == second["best"]
    assert Path(first["best"]).name in {"checkpoint-4", "checkpoint-6"}


@can_resume
@pytest.mark.support("DDP, two processes: resume before and after pruning")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("step", [2, 4])
def test_resuming_before_and_after_the_prune(method: str, step: int, two: Path) -> None:
    whole = of_both(two, "fanlora_pruned")[0]
    for resumed in of_both(two, "fanlora_resumed"):
        resumed = resumed[step]
        assert resumed["setting"] == whole["setting"]
        assert resumed["rates"] == whole["rates"]
        close(resumed["weights"], whole["weights"])


@pytest.mark.support("DDP, two processes: one adapter is saved")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_one_adapter_is_saved(method: str, two: Path) -> None:
    whole = of_both(two, "fanlora_pruned")[0]
    saved = two / "fanlora_pruned" / "final"
    assert [file.name for file in saved.glob("*.safetensors")] == ["adapter_model.safetensors"]
    assert json.loads((saved / "fanlora_setting.json").read_text()) == whole["setting"]
    loaded = PeftModel.from_pretrained(TINY["llama"].base(), saved, is_trainable=True)
    close(scenarios.values(loaded), whole["weights"], 0)


@pytest.mark.support("SFT under DDP, two processes")
@pytest.mark.parametrize("method", scenarios.METHODS)
def test_sft(method: str, two: Path, one: Any) -> None:
    expected = one("sft")[method]
    first, second = (found[method] for found in of_both(two, "sft"))
    assert first["is_ddp"]
    close(first["weights"], second["weights"], 0)
    close(first["weights"], expected["weights"], 1e-4)
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert moved(method, first["weights"]) > 1e-2
    (saved,) = (two / "sft" / method / "checkpoint-6").glob("*.safetensors")
    assert len(load_file(saved)) == len(first["weights"])


@can_resume
@pytest.mark.support("SFT under DDP, two processes")
@pytest.mark.parametrize("method", scenarios.METHODS)
def test_sft_resumed(method: str, two: Path) -> None:
    for whole, resumed in zip(of_both(two, "sft"), of_both(two, "sft_resumed"), strict=True):
        close(resumed[method]["weights"], whole[method]["weights"], 1e-6)


@pytest.mark.support("DPO under DDP, two processes")
@pytest.mark.parametrize("method", scenarios.METHODS)
def test_dpo(method: str, two: Path, one: Any) -> None:
    """The reference passes run with the adapter switched off, beside the wrapper."""
    expected = one("dpo")[method]
    first, second = (found[method] for found in of_both(two, "dpo"))
    close(first["weights"], second["weights"], 0)
    close(first["weights"], expected["weights"], 1e-4)
    assert first["losses"] == pytest.approx(expected["losses"], abs=1e-3)
    assert moved(method, first["weights"]) > 1e-2


@pytest.mark.support("transformers.Trainer under DDP, two processes")
@pytest.mark.parametrize("method", scenarios.METHODS)
def test_the_plain_trainer(method: str, two: Path, one: Any) -> None:
    expected = one("plain_trainer")[method]
    first, second = (found[method] for found in of_both(two, "plain_trainer"))
    assert first["is_ddp"]
    close(first["weights"], second["weights"], 0)
    close(first["weights"], expected["weights"], 1e-4)
    assert moved(method, first["weights"]) > 1e-2


@pytest.mark.support("DPO under DDP, two processes: pruning in the run")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_pruning_within_dpo(method: str, two: Path, one: Any) -> None:
    expected = one("dpo_pruned")
    first, second = of_both(two, "dpo_pruned")
    assert first["scores"] == second["scores"]
    (scores, num_tokens), (found, tokens) = expected["scores"], first["scores"]
    assert (tokens, first["kept"]) == (num_tokens, expected["kept"])
    assert found == pytest.approx(scores, rel=1e-3, abs=1e-6)
    close(first["weights"], second["weights"], 0)
    close(first["weights"], expected["weights"], 1e-4)
    assert first["wrapped"] == first["in_optimizer"] == 2 * 6
