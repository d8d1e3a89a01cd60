"""The experiments for PEFT's own benchmark: their size on Llama-3.2-3B, and what the benchmark does with them."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import peft_fanlora  # noqa: F401


FOLDER = Path(__file__).parents[2] / "benchmarks" / "peft_method_comparison"
EXPERIMENTS = sorted(path.parent for path in FOLDER.glob("experiments/*/*/adapter_config.json"))
MAKE = runpy.run_path(str(FOLDER / "make.py"))


def adapted(experiment: Path, base: PreTrainedModel) -> PeftModel:
    config = PeftConfig.from_pretrained(str(experiment))
    assert experiment.parent.name == config.peft_type.value.lower()
    return get_peft_model(base, config, low_cpu_mem_usage=base.device.type == "meta")


def test_both_methods_have_an_experiment_that_the_script_makes() -> None:
    assert {experiment.parent.name for experiment in EXPERIMENTS} == {"fanlora", "para"}
    made = MAKE["configs"]()
    assert {f"{experiment.parent.name}/{experiment.name}" for experiment in EXPERIMENTS} == set(made)
    for experiment in EXPERIMENTS:
        found, expected = (
            PeftConfig.from_pretrained(str(experiment)),
            made[f"{experiment.parent.name}/{experiment.name}"],
        )
        assert found.r == expected.r
        assert getattr(found, "setting", None) == getattr(expected, "setting", None)


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_the_adapter_has_the_stated_size_on_the_benchmarks_model(experiment: Path) -> None:
    model = adapted(experiment, MAKE["llama_3b"]())
    trained, _ = model.get_nb_trainable_parameters()
    assert trained == pytest.approx(9_175_040, rel=0.05)
    assert f"{trained:,}" in (FOLDER / "README.md").read_text()
    assert set(json.loads((experiment / "training_params.json").read_text())) == {"optimizer_kwargs"}


def small_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=17_000,  # the ids of the prompt's end have to exist
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


def question_and_answer(rows: int, answer: int) -> dict[str, torch.Tensor]:
    """A batch as the benchmark makes it: labels on the question too, padding on the left where answer is 0."""
    input_ids = torch.randint(100, 600, (rows, 12 + answer))
    input_ids[:, 10:12] = torch.tensor(MAKE["PROMPT_END"])
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.parent.name)
def test_the_adapter_trains_and_generates_as_the_benchmark_does(experiment: Path) -> None:
    """PEFT's benchmark trains on questions as well, so that its labels do not show where a prompt ends."""
    model = adapted(experiment, small_llama())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = question_and_answer(rows=3, answer=6)
    losses = []
    for _ in range(8):
        loss = model(**batch, labels=batch["input_ids"], num_items_in_batch=batch["attention_mask"].sum()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

    prompts = question_and_answer(rows=2, answer=0)
    prompts["attention_mask"][0, :4] = 0
    arguments: dict[str, Any] = {"max_length": 20, "cache_implementation": "static", "pad_token_id": 0}
    with torch.inference_mode():
        output = model.eval().generate(**prompts, generation_config=GenerationConfig(**arguments))
    assert output.shape[0] == 2 and 13 <= output.shape[1] <= 20
