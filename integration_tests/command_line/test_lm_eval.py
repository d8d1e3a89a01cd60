"""lm-evaluation-harness, which loads adapters with PEFT and does not know this package, on a task in local files."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaForCausalLM

from integration_tests.helpers.models import adapted
from integration_tests.helpers.text import save_base, sentences
from peft_fanlora import export_lora
from peft_fanlora.command_line.running import run


lm_eval = pytest.importorskip("lm_eval")
tasks = pytest.importorskip("lm_eval.tasks")

TASK = """
task: next_word
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: ["{{next}}", "w1"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""
END_OF_PROMPT = [1, 5]  # "<s> assistant", with which the answer begins in the chat template


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter of each method, the plain export of FanLoRA's, and a task."""
    folder = tmp_path_factory.mktemp("lm_eval")
    save_base(folder / "base")
    fanlora = adapted("FanLoRA", base=base(folder))
    fanlora.save_pretrained(folder / "fanlora")
    export_lora(fanlora, folder / "plain")
    adapted("PARA", base=base(folder), prompt_end_token_ids=END_OF_PROMPT).save_pretrained(folder / "para")
    rows = [sentence.split() for sentence in sentences(6)]
    rows = [{"text": " ".join(words[: 2 + row]), "next": words[2 + row]} for row, words in enumerate(rows)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "next_word.yaml").write_text(TASK.replace("ROWS", str(folder / "rows.jsonl")))
    return folder


def base(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "base")


def likelihoods(samples: list[dict[str, Any]]) -> list[float]:
    """Returns the logarithm of the likelihood of each choice of each row."""
    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    return [float(choice[0]) for sample in samples for choice in sample["filtered_resps"]]


def evaluated(folder: Path, adapter: str | None) -> list[float]:
    """Evaluates in this process, where both methods are registered."""
    arguments = f"pretrained={folder / 'base'}" + (f",peft={folder / adapter}" if adapter else "")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=["next_word"],
        task_manager=tasks.TaskManager(include_path=str(folder), include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )
    return likelihoods(found["samples"]["next_word"])


def test_fanlora_and_its_plain_export_have_the_same_results(folder: Path) -> None:
    unadapted, fanlora, plain = (evaluated(folder, adapter) for adapter in (None, "fanlora", "plain"))
    assert len(fanlora) == 12
    assert fanlora == pytest.approx(plain, abs=1e-4)
    assert fanlora != pytest.approx(unadapted, abs=0.1)


def test_run_evaluates_para_with_the_prompt_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = f"--model hf --model_args pretrained={folder / 'base'},peft={folder / 'para'} --tasks next_word"
    arguments += f" --include_path {folder} --device cpu --batch_size 4 --apply_chat_template"
    arguments += f" --log_samples --output_path {folder / 'output'}"
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.syspath_prepend(folder)  # and is restored, since `run` replaces the first entry
    with pytest.raises(SystemExit) as ended:
        run(["lm_eval", *arguments.split()])
    assert not ended.value.code
    (written,) = (folder / "output").rglob("samples_next_word_*.jsonl")
    samples = [json.loads(line) for line in written.read_text().splitlines()]
    model = PeftModel.from_pretrained(base(folder), folder / "para").eval()
    expected = [likelihood(model, choice) for sample in samples for choice in sample["arguments"].values()]
    assert likelihoods(samples) == pytest.approx(expected, abs=1e-4)


def likelihood(model: PeftModel, choice: dict[str, str]) -> float:
    """Computes what the harness shall find: the answer is no part of the prompt that the generators read."""
    words = AutoTokenizer.from_pretrained(model.base_model.model.name_or_path)
    prompt, answer = (
        words(choice[argument], add_special_tokens=False)["input_ids"] for argument in ("arg_0", "arg_1")
    )
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model(ids, prompt_mask=torch.arange(ids.shape[1])[None] < len(prompt)).logits
    of_answer = logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
    return float(of_answer.gather(1, torch.tensor(answer)[:, None]).sum())
