"""The code of the README and of the pages in docs/ runs as it stands, block after block, on a tiny model.

The blocks run in a folder where the names of the Hub that they use are local folders. What a page takes for granted, such
as the reader's own model, comes from `GIVEN`.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from integration_tests.helpers.brute_force import loss_of
from integration_tests.helpers.chat import save_tiny_chat_model
from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from peft_fanlora import (
    FanLoraCallback,
    FanLoraConfig,
    FanLoraModel,
    ParaConfig,
    export_lora,
    get_prompt_end_token_ids,
)
from peft_fanlora.fanlora import cost_measurement
from peft_fanlora.fanlora.importance import SCORES
from peft_fanlora.para.core.generator import POOLINGS


pytestmark = pytest.mark.xdist_group("docs_code")  # one worker makes what its tests share


ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))}
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks(page: str, language: str) -> list[tuple[int, str]]:
    """Returns the blocks of code of a page, each with the number of its first line."""
    text = PAGES[page].read_text()
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text.count("\n", 0, match.start(1)), match[1]) for match in found]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny chat model and a small data set under their names on the Hub."""
    folder = tmp_path_factory.mktemp("hub")
    save_tiny_chat_model(folder / NAME, num_hidden_layers=10)
    (folder / "trl-lib/tldr").mkdir(parents=True)
    prompts_and_completions(104).to_json(folder / "trl-lib/tldr/train.jsonl")
    return folder


def prompts_and_completions(rows: int = 16) -> Dataset:
    return Dataset.from_list([{"prompt": f"Count to {row}.", "completion": f" One to {row}"} for row in range(rows)])


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(NAME)


def arguments() -> SFTConfig:
    return SFTConfig("output", max_steps=2, bf16=False, use_cpu=True)


def save_adapter(folder: str, config: Any) -> None:
    model = get_peft_model(base(), config)
    randomize(model, std=0.1)
    model.save_pretrained(folder)


def batches() -> DataLoader:
    ids = torch.randint(3, 60, (4, 9), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]
    return DataLoader(rows, batch_size=2)


def about_fanlora() -> dict[str, Any]:
    rows = prompts_and_completions()
    instructions = {"train": rows, "test": rows}
    return {"name": NAME, "args": arguments(), "instructions": instructions, "calibration_dataset": rows}


def about_para() -> dict[str, Any]:
    end = get_prompt_end_token_ids(AutoTokenizer.from_pretrained(NAME))
    for tenant in "ab":
        save_adapter(f"tenant-{tenant}", ParaConfig(task_type="CAUSAL_LM", prompt_end_token_ids=end))
    ids = torch.randint(3, 60, (3, 9), generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids, "prompt_lengths": torch.tensor([3, 4, 5]), "inputs": {"input_ids": ids}}
    given["args"] = arguments()
    return {"name": NAME, "base": base(), "prompts_and_completions": prompts_and_completions(), **given}


def about_lora() -> dict[str, Any]:
    save_adapter("my-lora", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    save_adapter("their-lora", LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    inputs = {"input_ids": torch.randint(3, 20, (3, 5))}
    return {"base": base(), "fresh_base": base(), "dataloader": batches(), "inputs": inputs}


def about_several_processes() -> dict[str, Any]:
    config = FanLoraConfig(r=2, task_type="CAUSAL_LM")
    save_adapter("trained-adapter", config)
    known = {known.__name__: known for known in (AutoModelForCausalLM, FanLoraCallback, PeftModel, SFTTrainer)}
    data = {
        "args": arguments(),
        "instructions": prompts_and_completions(),
        "calibration_dataset": prompts_and_completions(),
    }
    return {"name": NAME, "model": get_peft_model(base(), config), "dataloader": batches(), **data, **known}


def about_serving() -> dict[str, Any]:
    for customer in (1, 2):
        save_adapter(f"adapters/customer-{customer}", FanLoraConfig(r=2 * customer, task_type="CAUSAL_LM"))
    return {}


def about_vllm() -> dict[str, Any]:
    return {"model": get_peft_model(base(), FanLoraConfig(r=2, task_type="CAUSAL_LM")), "export_lora": export_lora}


def about_recipes() -> dict[str, Any]:
    turns = [
        [{"role": "user", "content": f"Count to {row}."}, {"role": "assistant", "content": "One."}] for row in range(8)
    ]
    Dataset.from_list([{"messages": messages} for messages in turns]).to_json("chats.jsonl")
    Dataset.from_list([{"text": f"Film {row}", "label": row % 2} for row in range(16)]).to_json("reviews.jsonl")
    for tenant in "ab":
        save_adapter(f"loras/{tenant}", LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return about_serving()


GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "README.md": dict,
    "docs/distributed.md": about_several_processes,
    "docs/extending.md": dict,
    "docs/fanlora.md": about_fanlora,
    "docs/from-lora.md": about_lora,
    "docs/index.md": about_serving,
    "docs/para.md": about_para,
    "docs/recipes.md": about_recipes,
    "docs/serving.md": about_serving,
    "docs/vllm.md": about_vllm,
}
RUN_ELSEWHERE: dict[str, str] = {
    "docs/recipes.md": "integration_tests/project/test_docs_code.py",
    "docs/sharing.md": "integration_tests/sharing/test_hub.py",
}
"""Pages whose code another test runs, and its file."""
UPLOADS = re.compile(r"^model\.push_to_hub\(", re.MULTILINE)
"""Is found in blocks of the recipes that integration_tests/sharing/test_hub.py runs."""


def run(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Runs the Python of a page in a folder, and returns the names that it leaves."""
    monkeypatch.chdir(folder)
    names = {"__name__": page, **GIVEN[page]()}
    for line, code in blocks(page, "python"):
        compiled = compile("\n" * line + code, str(PAGES[page]), "exec")
        needs_vllm = "from vllm" in code and not find_spec(
            "vllm"
        )  # integration_tests/vllm_engine makes the same calls
        if not needs_vllm and not UPLOADS.search(code):
            exec(compiled, names)
    return names


REGISTRIES: list[dict[Any, Any]] = [
    SCORES,
    POOLINGS,
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
]


@pytest.fixture(autouse=True)
def same_registries() -> Iterator[None]:
    """Removes what a page registers: other tests list the scores and the poolings of this package."""
    with ExitStack() as stack:
        for registry in REGISTRIES:
            stack.enter_context(patch.dict(registry))
        yield


@pytest.fixture(autouse=True)
def steps_without_a_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives modules costs that a budget leaves room for: those of tiny models are mostly Python's."""
    monkeypatch.setattr(
        cost_measurement,
        "step_times",
        lambda base, engine, samples, **_: (1.0, [1 + 1e-3 * len(names) for names in samples]),
    )


@pytest.fixture
def folder(hub: Path, tmp_path: Path) -> Path:
    """An empty folder beside the names of the Hub."""
    for organisation in hub.iterdir():
        (tmp_path / organisation.name).symlink_to(organisation)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_the_python_of_a_page_runs(page: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page in RUN_ELSEWHERE:
        assert Path(page).name in (ROOT / RUN_ELSEWHERE[page]).read_text()
        return
    assert page in GIVEN, f"{page} has code; put what it takes for granted into GIVEN"
    run(page, folder, monkeypatch)


def test_the_score_of_the_page_is_what_its_docstring_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/extending.md", folder, monkeypatch)
    model = fanlora("llama")
    batches = [TINY["llama"].batch(seed=seed) for seed in (1, 2)]
    scores = model.score_modules(batches, method="alone")
    assert dict(scores) == dict(model.score_modules(batches, method=names["alone"]))
    nothing = loss_of(model, batches, set())
    for name in list(scores)[::5]:
        assert scores[name] == pytest.approx(nothing - loss_of(model, batches, {name}), abs=1e-5)


def test_the_pooling_and_the_layout_of_the_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/extending.md", folder, monkeypatch)
    mask = torch.tensor([[[True, True, True, False]], [[False] * 4]])
    weights = names["recency_weights"](torch.randn(2, 4, 3), mask)
    expected = torch.tensor([[[1.0, 2.0, 4.0, 0.0]], [[0.0] * 4]]) / 7
    torch.testing.assert_close(weights, expected)
    slices = names["heads_in_three_runs"](LlamaConfig(hidden_size=32))
    assert (slices.num_outputs, slices.num_scaled) == (96, 64)


def test_the_recipes_run_and_resume_when_they_are_run_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = run("docs/recipes.md", folder, monkeypatch)
    assert names["checkpoint"] is None
    steps, setting = names["trainer"].state.global_step, names["callback"].setting
    (code,) = (code for _, code in blocks("docs/recipes.md", "python") if "get_last_checkpoint" in code)
    last = Path("run", f"checkpoint-{steps}")
    last.rename("lost")  # as if the run had broken off before its last checkpoint
    exec(code, names)
    assert names["checkpoint"] and names["trainer"].state.global_step == steps
    assert names["callback"].setting == setting


def test_serving_reads_the_same_with_para(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tenants() -> dict[str, Any]:
        for customer in (1, 2):
            save_adapter(f"adapters/customer-{customer}", ParaConfig(r=2 * customer, task_type="CAUSAL_LM"))
        return {}

    monkeypatch.setitem(GIVEN, "docs/serving.md", tenants)
    names = run("docs/serving.md", folder, monkeypatch)
    assert sorted(names["model"].peft_config) == ["customer-1", "customer-3"]
    assert len(names["answers"]) == 3


def test_a_lora_adapter_becomes_the_same_fanlora_adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the page about LoRA promises, by the code that it shows."""
    monkeypatch.chdir(folder)
    given = about_lora()
    exec(blocks("docs/from-lora.md", "python")[0][1], given)
    assert set(given["model"].peft_config) == {"default", "their-lora"}
    batch = next(iter(given["dataloader"]))
    plain = PeftModel.from_pretrained(base(), "my-lora")
    torch.testing.assert_close(logits(given["model"].eval(), batch), logits(plain.eval(), batch))
    assert type(given["model"].base_model) is FanLoraModel


COMMAND = re.compile(
    r"python (?P<script>(?:examples|benchmarks|integration_tests|docs)/\S+\.py)(?P<arguments>[^`\n]*)"
)
COMMANDS = sorted(
    {
        (match["script"], match["arguments"].partition("#")[0].strip())
        for path in (*PAGES.values(), *ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py"))
        for match in COMMAND.finditer(path.read_text())
    }
)


@pytest.mark.parametrize(("script", "arguments"), COMMANDS)
def test_the_scripts_that_are_named_have_the_options_that_are_named(script: str, arguments: str) -> None:
    source = (ROOT / script).read_text()
    for option in (word for word in arguments.split() if word.startswith("--")):
        parameter = option[2:].replace("-", "_")  # typer makes the options of the parameters
        assert re.search(rf"^ +{parameter}: |\"{option}\"", source, re.MULTILINE), f"{script} has no {option}"


def test_the_make_targets_and_extras_that_are_named_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    extras = set(
        re.findall(
            r"^([a-z]+) = \[",
            (ROOT / "pyproject.toml").read_text().partition("optional-dependencies]")[2],
            re.MULTILINE,
        )
    )
    named = {"targets": set(), "extras": set()}
    for path in (*PAGES.values(), ROOT / "CONTRIBUTING.md"):
        text = path.read_text()
        named["targets"] |= set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE))
        named["extras"] |= {
            extra for found in re.findall(r"peft-fanlora\[([a-z,]+)\]", text) for extra in found.split(",")
        }
    assert {"quickstart", "docs"} <= named["targets"] <= targets
    assert {"trl", "plots"} <= named["extras"] <= extras
