"""PARA adapters with their reference answers from transformers, and vLLM engines that serve them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from integration_tests.helpers.models import randomize
from peft_fanlora import ParaConfig


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines run in this process, where the tests can access them
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

VOCAB = 128
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # supported by vLLM's CPU attention; equal to hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PROMPT_END = [5, 6]

TENANTS: dict[str, dict[str, Any]] = {
    "attention": {},
    "mean": {"pooling": "mean", "r": 7},
    "max": {"pooling": "max", "activation": "silu"},
    "last": {"pooling": "last", "activation": "tanh", "r": 1},
    "rational": {"activation": "rational", "target_modules": ["v_proj", "up_proj"]},
    "up": {"target_modules": ["up_proj"]},
    "one-block": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "prompt-end": {"prompt_end_token_ids": PROMPT_END},
}
BASE = ""
"""The tenant name of jobs for the base model."""


def make_base(folder: Path, config_class: str = "LlamaConfig", **overrides: Any) -> Path:
    """Saves a tiny model and returns the folder. Its random weights are large enough for varied answers."""
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**LLAMA, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Job:
    """A prompt for a tenant, and the reference answer from transformers (token ids)."""

    tenant: str
    prompt: list[int]
    answer: list[int]


@dataclass
class Tenants:
    """The adapters of a base model: their folders, and a PEFT model that has all of them."""

    base: Path
    folders: dict[str, Path]
    model: PeftModel
    ids: dict[str, int] = field(default_factory=dict)

    @torch.no_grad()
    def answer(self, tenant: str, prompt: list[int], new_tokens: int) -> list[int]:
        """Returns the greedy continuation of a prompt by transformers."""
        inputs = torch.tensor([prompt])
        lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
        options = {"attention_mask": torch.ones_like(inputs), "do_sample": False, "pad_token_id": 0, **lengths}
        self.model.generation_config.eos_token_id = None
        if tenant == BASE:
            with self.model.disable_adapter():
                output = self.model.generate(input_ids=inputs, **options)
        else:
            self.model.set_adapter(tenant)
            output = self.model.generate(input_ids=inputs, **options)
        return output[0, len(prompt) :].tolist()

    def job(self, tenant: str, prompt: list[int], new_tokens: int) -> Job:
        """Returns a job with the answer from transformers."""
        return Job(tenant, prompt, self.answer(tenant, prompt, new_tokens))

    def request(self, tenant: str, copy: int = 0, **options: Any) -> Any:
        """Returns the `LoRARequest` of a tenant; None for the base model."""
        from vllm.lora.request import LoRARequest

        if tenant == BASE:
            return None
        name = f"{tenant}-{copy}" if copy else tenant
        number = self.ids.setdefault(name, len(self.ids) + 1)
        return LoRARequest(name, number, str(self.folders[tenant]), **options)


def make_tenants(base: Path, folder: Path, configs: dict[str, dict[str, Any]] = TENANTS) -> Tenants:
    """Creates and saves a PARA adapter with random weights for each config."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    folders, adapted = {}, None
    for seed, (name, config) in enumerate(configs.items(), start=1):
        own = ParaConfig(**{"r": 4, "task_type": "CAUSAL_LM", **config})
        if adapted is None:
            adapted = get_peft_model(model, own, adapter_name=name)
        else:
            adapted.add_adapter(name, own)
        randomize(adapted, name, seed=seed)
        adapted.save_pretrained(str(folder), selected_adapters=[name])
        folders[name] = folder / name
    assert adapted is not None
    return Tenants(base, folders, adapted.eval())


def prompts(count: int, seed: int, longest: int = 60, shortest: int = 1) -> Iterator[list[int]]:
    """Yields prompts of random tokens and lengths; two thirds of the longer ones contain `PROMPT_END`."""
    random = torch.Generator().manual_seed(seed)
    for index in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=random))
        prompt = torch.randint(7, VOCAB, (length,), generator=random).tolist()
        if index % 3 and length > 8:
            prompt[length // 2 : length // 2 + len(PROMPT_END)] = PROMPT_END
        yield prompt


def make_jobs(tenants: Tenants, count: int, new_tokens: int, seed: int = 0, longest: int = 60) -> list[Job]:
    """Returns jobs for all tenants and the base model in turn."""
    names = [*tenants.folders, BASE]
    return [
        tenants.job(names[index % len(names)], prompt, new_tokens)
        for index, prompt in enumerate(prompts(count, seed, longest))
    ]


def start(base: Path, **options: Any) -> Any:
    """Starts an engine with the "para" option in this process."""
    from vllm import LLM

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 2**24,
        "enable_lora": True,
        "max_loras": 8,
        "additional_config": {"para": {}},
    }
    return LLM(str(base), **{**defaults, **options})


def manager(llm: Any) -> Any:
    """Returns the `ParaManager` of an engine in this process."""
    (found,) = llm.collective_rpc(lambda worker: worker.model_runner.lora_manager)
    return found


def sampling(new_tokens: int, **options: Any) -> Any:
    """Returns sampling parameters for greedy decoding of a fixed number of tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0, "max_tokens": new_tokens, "ignore_eos": True, "detokenize": False, **options}
    )


def answers(llm: Any, tenants: Tenants, jobs: Sequence[Job], copies: Sequence[int] = ()) -> list[list[int]]:
    """Adds all jobs to the engine at once and returns the tokens of their answers."""
    outputs = llm.generate(
        [{"prompt_token_ids": job.prompt} for job in jobs],
        [sampling(len(job.answer)) for job in jobs],
        lora_request=[
            tenants.request(job.tenant, copy) for job, copy in zip(jobs, copies or [0] * len(jobs), strict=True)
        ],
        use_tqdm=False,
    )
    return [list(output.outputs[0].token_ids) for output in outputs]


def count_misses(found: Sequence[Sequence[int]], jobs: Sequence[Job]) -> int:
    """Returns the number of tokens that differ from those of transformers."""
    return sum(
        own != other
        for tokens, job in zip(found, jobs, strict=True)
        for own, other in zip(tokens, job.answer, strict=True)
    )


def check(llm: Any, tenants: Tenants, jobs: Sequence[Job]) -> None:
    """Serves jobs, compares each token, and checks that their slots are freed."""
    assert count_misses(answers(llm, tenants, jobs), jobs) == 0
    check_alive(llm, tenants, jobs[:1])


def check_alive(llm: Any, tenants: Tenants, jobs: Sequence[Job]) -> None:
    """Serves a few jobs, compares each token, and checks that the slots of earlier requests are freed."""
    assert answers(llm, tenants, jobs) == [job.answer for job in jobs]
    vectors = manager(llm).vectors
    names = {job.tenant for job in jobs} - {BASE}
    assert len(vectors.slots) <= len(names)  # vLLM reports a finished request in the next step
