"""The examples, the benchmarks and the README's code run as they stand, at a small size."""

import json
import subprocess
import sys
from pathlib import Path

import assets
import pytest
from peft import get_peft_model
from tiny_models import TINY
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from peft_fanlora import FanLoraConfig, ParaConfig


ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def tiny_chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model with SmolLM2's tokenizer and next to no weights."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder())
    tokenizer.save_pretrained(folder)
    config = {**TINY["llama"].config, "vocab_size": len(tokenizer), "max_position_embeddings": 256}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_quickstart(tiny_chat_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny_chat_model, "--steps", "2", "--task-steps", "2", "--output", tmp_path / "out"]
    printed = run("examples/quickstart.py", *arguments)
    assert "pruned at random, draw 3" in printed
    assert "LoRA on Q and V" in printed
    files = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for file in ("importance.png", "setting/fanlora_setting.json", "adapter/fanlora_setting.json", "results.json"):
        assert file in files
    assert json.loads((tmp_path / "out/plain-lora/adapter_config.json").read_text())["peft_type"] == "LORA"
    results = json.loads((tmp_path / "out/results.json").read_text())
    pruned = results["instructions"]["pruned by score"]["parameters"]
    assert {results["instructions"][f"pruned at random, draw {draw}"]["loss"] for draw in (1, 2, 3)}
    assert pruned < results["instructions"]["LoRA on all modules"]["parameters"]


def test_scoring_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "scoring.json"
    run("benchmarks/scoring.py", "--model", tiny_chat_model, "--steps", "1", "--output", file)
    result = json.loads(file.read_text())
    assert result["modules"] == 21
    assert set(result["seconds"]) == {"path", "ablation", "sensitivity", "output_norm", "weight_norm"}
    assert result["machine"]["threads"] >= 1


def test_para_example(tiny_chat_model: Path, tmp_path: Path) -> None:
    arguments = ["--model", tiny_chat_model, "--steps", "2", "--ia3", "1e-2", "--output", tmp_path / "out"]
    run("examples/para_sft.py", *arguments)
    results = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert [result["method"] for result in results] == ["PARA", "IA3"]
    assert (tmp_path / "out/adapter/adapter_model.safetensors").exists()


def test_serving_benchmark(tiny_chat_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "serving.json"
    arguments = ["--model", tiny_chat_model, "--rounds", "2", "--slow-rounds", "1", "--new-tokens", "2"]
    arguments += ["--prompt-length", "4", "--output", file, "--plots", tmp_path]
    options = [option for measure in ("decode", "prefill", "beams3") for option in ("--measure", measure)]
    run("benchmarks/serving.py", *arguments, "--tenants", "1", "--tenants", "2", *options)
    run("benchmarks/serving.py", *arguments, "--tenants", "2", "--measure", "decode")  # takes the place of the first
    results = json.loads(file.read_text())["results"]
    assert {result["ratio"] for result in results if result["method"] == "base model"} == {1}
    assert len(results) == 3 * (9 + 7)
    assert all(result["tokens_per_s"] > 0 for result in results if result["measure"].startswith("beams"))
    assert {path.name for path in tmp_path.glob("*.png")} == {"serving-steps-cpu.png", "serving-ratios-cpu.png"}
    memory = run("benchmarks/memory.py", "PARA", "--model", tiny_chat_model, "--tenants", "2", "--prompt-length", "4")
    assert float(memory.split()[-1]) > 50


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_the_code_about_serving_runs(method: str, tiny_chat_model: Path, tmp_path: Path) -> None:
    for customer in (1, 2):
        config = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}[method](r=2 * customer, task_type="CAUSAL_LM")
        model = get_peft_model(LlamaForCausalLM.from_pretrained(tiny_chat_model), config)
        model.save_pretrained(tmp_path / f"adapters/customer-{customer}")
    text = (ROOT / "docs/serving.md").read_text()
    code = "\n".join(part.partition("```")[0] for part in text.split("```python\n")[1:])
    code = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', f'"{tiny_chat_model}"')
    (tmp_path / "serving.py").write_text(code + "\nprint(len(answers), sorted(model.peft_config))")
    assert "3 ['customer-1', 'customer-3']" in run("serving.py", cwd=tmp_path)


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_the_readme_code_runs(method: str, tiny_chat_model: Path, tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text().partition(f"## {method}\n")[2]
    code = section.partition("```python\n")[2].partition("```")[0]
    rows = [{"prompt": "w1 w2 w3", "completion": f" w{index}"} for index in range(120)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {
        '"HuggingFaceTB/SmolLM2-135M-Instruct"': f'"{tiny_chat_model}"',
        'load_dataset("trl-lib/tldr", split="train[:2000]")': 'load_dataset("json", data_files="rows.jsonl", split="train")',
        "num_parameters=1_000_000": "num_parameters=5_000",
        "from trl import SFTTrainer": "from trl import SFTConfig, SFTTrainer",
        "SFTTrainer(model, ": "SFTTrainer(model, args=SFTConfig('output', use_cpu=True, max_steps=3), ",
    }
    for there, here in changes.items():
        assert there in code or "1_000_000" in there
        code = code.replace(there, here)
    (tmp_path / "readme.py").write_text(code)
    run("readme.py", cwd=tmp_path)
    written = {"FanLoRA": ["my-setting/fanlora_setting.json", "plain-lora/adapter_model.safetensors"]}
    for file in written.get(method, ["tenant-a/adapter_model.safetensors"]):
        assert (tmp_path / file).exists()


def test_a_download_that_is_not_the_expected_file_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEFT_FANLORA_CACHE", str(tmp_path))
    write = (sys.executable, "-c", "open('file', 'w').write('something else')")
    with pytest.raises(RuntimeError, match="expected 0000: it was not kept"):
        assets.Download(write, "0000").path("thing")
    fail = (sys.executable, "-c", "raise SystemExit(1)")
    with pytest.raises(RuntimeError, match="downloading thing failed"):
        assets.Download(fail, "0000").path("thing")
    assert list(tmp_path.iterdir()) == []


def test_the_data_has_no_row_twice() -> None:
    for rows in (assets.glosses(), assets.sentiment()):
        prompts = [row["prompt"][-1]["content"] for row in rows]
        assert len(set(prompts)) == len(prompts) > 10_000
