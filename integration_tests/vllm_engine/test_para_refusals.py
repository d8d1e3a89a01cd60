"""Requests and adapters that PARA in vLLM refuses: the error names the reason, and the engine keeps serving."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from integration_tests.helpers.bad_folders import BAD_FOLDERS, set_config
from integration_tests.helpers.models import randomize
from integration_tests.vllm_engine.para_engines import (
    BASE,
    Job,
    Tenants,
    check_alive,
    make_base,
    make_tenants,
    prompts,
    sampling,
    start,
)


pytestmark = pytest.mark.vllm

BAD_LORA: dict[str, Callable[[Path], Any]] = {
    "LoRA": lambda folder: None,
    "LoRA without weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "LoRA of rank 600": set_config(r=600),
    "DoRA": set_config(use_dora=True),
}
"""Changes to a LoRA adapter. An engine that serves only PARA refuses it with and without them."""


class Served:
    """An engine, and jobs that it must answer correctly after each refusal."""

    def __init__(self, folder: Path) -> None:
        self.tenants: Tenants = make_tenants(make_base(folder / "base"), folder / "tenants", {"good": {}})
        prompt = next(prompts(1, seed=1, shortest=20))
        self.jobs: list[Job] = [self.tenants.job(name, prompt, 3) for name in ("good", BASE)]
        self.llm = start(self.tenants.base, max_num_batched_tokens=64, enable_chunked_prefill=True)
        self.number = 100

    def named(self, folder: Path | str) -> Any:
        """Returns a `LoRARequest` with a new name and id."""
        from vllm.lora.request import LoRARequest

        self.number += 1
        return LoRARequest(f"tenant-{self.number}", self.number, str(folder))

    def generate(self, request: Any, prompt: Any = None, **options: Any) -> None:
        prompt = {"prompt_token_ids": [5, 6, 7]} if prompt is None else prompt
        self.llm.generate([prompt], sampling(2, **options), lora_request=request, use_tqdm=False)

    def check(self) -> None:
        check_alive(self.llm, self.tenants, self.jobs)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield Served(tmp_path_factory.mktemp("served"))


@pytest.fixture
def folder(served: Served, tmp_path: Path) -> Path:
    return Path(shutil.copytree(served.tenants.folders["good"], tmp_path / "tenant"))


@pytest.fixture
def lora(served: Served, tmp_path: Path) -> Path:
    base = LlamaForCausalLM.from_pretrained(served.tenants.base)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4))
    randomize(model)
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders(name: str, served: Served, folder: Path) -> None:
    """Each folder is refused in a request, and when it is loaded with `add_lora`."""
    change, _ = BAD_FOLDERS[name]
    change(folder)
    request = served.named(folder)
    with pytest.raises(ValueError, match=str(folder)):
        served.generate(request)
    served.check()
    with pytest.raises(Exception, match=str(folder)):
        served.llm.llm_engine.add_lora(request)
    served.check()


@pytest.mark.parametrize("name", BAD_LORA)
def test_lora_where_para_alone_is_served(name: str, served: Served, lora: Path) -> None:
    BAD_LORA[name](lora)
    with pytest.raises(ValueError, match='"lora": true'):
        served.generate(served.named(lora))
    served.check()


def test_paths_that_are_no_folders(served: Served, folder: Path) -> None:
    for path in ("no/such/tenant", str(folder / "adapter_config.json"), "/", "~no-one", "a b", str(folder.parent)):
        with pytest.raises(ValueError):
            served.generate(served.named(path))
        served.check()


BAD_REQUESTS: dict[str, tuple[dict[str, Any], str]] = {
    "longer than a step": ({"prompt_token_ids": list(range(5, 70))}, "max_num_batched_tokens"),
    "longer than the context": ({"prompt_token_ids": [5] * 200}, "maximum context length"),
    "empty": ({"prompt_token_ids": []}, "empty"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_bad_prompts(name: str, served: Served, folder: Path) -> None:
    prompt, message = BAD_REQUESTS[name]
    with pytest.raises(Exception, match=message):
        served.generate(served.tenants.request("good"), prompt)
    served.check()


def test_a_bad_request_among_good_ones(served: Served) -> None:
    prompt = {"prompt_token_ids": [5, 6, 7]}
    requests = [served.tenants.request("good"), served.named("no/such/tenant"), None]
    with pytest.raises(ValueError, match="no/such/tenant"):
        served.llm.generate([prompt] * 3, sampling(2), lora_request=requests, use_tqdm=False)
    served.check()


def test_a_folder_that_was_served_and_is_gone(served: Served, folder: Path) -> None:
    request = served.named(folder)
    served.generate(request)
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=str(folder)):
        served.generate(request)
    served.check()


def test_beam_search(served: Served) -> None:
    from vllm.sampling_params import BeamSearchParams

    with pytest.raises(ValueError, match="use n for"):
        served.llm.beam_search(
            [{"prompt_token_ids": [5, 6, 7]}],
            BeamSearchParams(beam_width=2, max_tokens=3),
            lora_request=served.tenants.request("good"),
        )
    served.check()


def test_prompts_as_embeddings_and_streamed_prompts(served: Served) -> None:
    """vLLM accepts these only with further options of the engine, so the plugin's check is called directly."""
    processor = served.llm.llm_engine.input_processor
    request = processor.process_inputs(
        "id",
        {"type": "token", "prompt_token_ids": [5, 6, 7]},
        sampling(2),
        ("generate",),
        lora_request=served.tenants.request("good"),
    )
    front = processor.para_front
    front.check_request(request)
    for name, value, message in (
        ("prompt_embeds", torch.zeros(3, 64), "prompt_embeds"),
        ("prompt_token_ids", None, "prompt_embeds"),
        ("mm_features", [object()], "images"),
        ("resumable", True, "streams its input"),
        ("pooling_params", object(), "pooling"),
    ):
        kept = getattr(request, name)
        setattr(request, name, value)
        with pytest.raises(ValueError, match=message):
            front.check_request(request)
        setattr(request, name, kept)
    served.check()


BAD_ENGINES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown option": ({"additional_config": {"para": {"speed": True}}}, "no option 'speed'"),
    "option of another type": ({"additional_config": {"para": {"lora": "yes"}}}, "true or false"),
    "no options": ({"additional_config": {"para": None}}, "not a dict"),
}


@pytest.mark.parametrize("name", BAD_ENGINES)
def test_engines_that_cannot_start(name: str, served: Served) -> None:
    from peft_fanlora.vllm_plugin.options import read_options

    options, message = BAD_ENGINES[name]
    with pytest.raises(ValueError, match=message):
        read_options(options["additional_config"])


def test_sleep_mode(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards against wrong vectors after waking up. vLLM itself refuses sleep mode on CPUs, so the check is called."""
    from peft_fanlora.vllm_plugin.worker import _check

    config = served.llm.llm_engine.vllm_config
    monkeypatch.setattr(config.model_config, "enable_sleep_mode", True)
    with pytest.raises(ValueError, match="enable_sleep_mode"):
        _check(config, torch.nn.Identity())


def test_an_incompatible_version(served: Served) -> None:
    from peft_fanlora.vllm_plugin.compatibility import NAMES, problems, refusal

    assert problems() == []
    gone = {"vllm.v1.core.sched.scheduler:Scheduler.no_such_method": ("self",)}
    changed = {name: (*parameters, "no_such_parameter") for name, parameters in NAMES.items()}
    assert "no_such_method is missing" in refusal(problems(gone))
    assert len(problems(changed)) == len(NAMES)
    message = refusal(problems(changed))
    assert "no_such_parameter" in message
    assert message.count(". ") <= 1 + message.count("0.")
