"""PARA in vLLM: all tokens equal those of transformers.

`make test-vllm` runs these tests, `make test-vllm-short` only the first one.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model

from integration_tests.helpers.models import randomize
from integration_tests.vllm_engine.para_engines import (
    BASE,
    TENANTS,
    Job,
    Tenants,
    answers,
    check,
    count_misses,
    make_base,
    make_jobs,
    make_tenants,
    manager,
    prompts,
    sampling,
    start,
)
from peft_fanlora import FanLoraConfig, export_lora


pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def tenants(tmp_path_factory: pytest.TempPathFactory) -> Tenants:
    base = make_base(tmp_path_factory.mktemp("base"))
    return make_tenants(base, tmp_path_factory.mktemp("tenants"))


def test_eight_tenants_beside_base_rows(tenants: Tenants) -> None:
    """The short test: one engine, and continuous batching with more requests than `max_num_seqs`."""
    jobs = make_jobs(tenants, 45, new_tokens=16)
    assert len({tuple(job.answer) for job in jobs}) > 40
    llm = start(tenants.base)
    for _ in range(2):
        check(llm, tenants, jobs)


def test_adapters_change_the_logits(tenants: Tenants) -> None:
    """Guards against adapters without an effect, with which all other tests would pass."""
    prompt = next(prompts(1, seed=5, shortest=20))
    without = log_probabilities(tenants, Job(BASE, prompt, []))
    for name in TENANTS:
        assert (log_probabilities(tenants, Job(name, prompt, [])) - without).abs().max() > 0.1


def test_preempted_requests_recompute_their_vectors(tenants: Tenants) -> None:
    jobs = make_jobs(tenants, 30, new_tokens=60, seed=1)
    llm = start(tenants.base, num_gpu_blocks_override=14, block_size=32)
    made = count_prompts(llm)
    check(llm, tenants, jobs)
    assert len(made) > sum(job.tenant != BASE for job in jobs) + 5


def count_prompts(llm: Any) -> list[tuple[int, int]]:
    """Returns a list to which each prefill of a PARA request adds (tokens in the step, tokens that are pooled)."""
    vectors, made = manager(llm).vectors, []
    begin = vectors.begin

    def counting(rows: Any) -> None:
        made.extend((row.num_tokens, row.num_prompt_tokens) for row in rows if row.num_prompt_tokens)
        begin(rows)

    vectors.begin = counting
    return made


def test_base_rows_read_the_prefix_cache_and_tenants_do_not(tenants: Tenants) -> None:
    common = next(prompts(1, seed=7, shortest=64, longest=64))
    names = [*TENANTS, BASE, BASE, BASE, BASE]
    jobs = [tenants.job(name, [*common, *tail], 12) for name, tail in zip(names * 3, prompts(36, 8, 20), strict=True)]
    llm = start(tenants.base, enable_prefix_caching=True, block_size=32)
    made = count_prompts(llm)
    for _ in range(2):
        assert count_misses(answers(llm, tenants, jobs), jobs) == 0
    assert all(tokens >= prompt for tokens, prompt in made)
    hits = []
    for tenant in (BASE, "attention"):
        (output,) = llm.generate(
            [{"prompt_token_ids": [*common, 9]}], sampling(2), lora_request=tenants.request(tenant), use_tqdm=False
        )
        hits.append(output.num_cached_tokens)
    assert hits[0] >= 32
    assert hits[1] == 0


def test_long_prompts_of_the_base_model_are_split_and_those_of_tenants_are_not(tenants: Tenants) -> None:
    jobs = make_jobs(tenants, 36, new_tokens=20, seed=2)
    llm = start(tenants.base, enable_chunked_prefill=True, max_num_batched_tokens=64, max_num_seqs=8)
    made = count_prompts(llm)
    check(llm, tenants, jobs)
    assert len(made) >= 32
    long_jobs = [tenants.job(BASE, prompt, 8) for prompt in prompts(6, 3, longest=110, shortest=100)]
    check(llm, tenants, [*long_jobs, *jobs[:16]])


def test_several_answers_to_a_prompt(tenants: Tenants) -> None:
    llm = start(tenants.base)
    prompt = next(prompts(1, seed=4, shortest=20))
    request = {"prompt_token_ids": prompt}
    several = sampling(12, n=3, temperature=1.0, seed=11)
    (output,) = llm.generate([request], several, lora_request=tenants.request("attention"), use_tqdm=False)
    alone = [sampling(12, temperature=1.0, seed=11 + index) for index in range(3)]
    outputs = llm.generate([request] * 3, alone, lora_request=[tenants.request("attention")] * 3, use_tqdm=False)
    found = [list(answer.token_ids) for answer in output.outputs]
    assert found == [list(each.outputs[0].token_ids) for each in outputs]
    assert len(set(map(tuple, found))) == 3


def test_log_probabilities_are_those_of_transformers(tenants: Tenants) -> None:
    jobs = make_jobs(tenants, 18, new_tokens=1, seed=6)
    llm = start(tenants.base)
    outputs = llm.generate(
        [{"prompt_token_ids": job.prompt} for job in jobs],
        sampling(1, logprobs=5),
        lora_request=[tenants.request(job.tenant) for job in jobs],
        use_tqdm=False,
    )
    for job, output in zip(jobs, outputs, strict=True):
        wanted = log_probabilities(tenants, job)
        for token, found in output.outputs[0].logprobs[0].items():
            assert found.logprob == pytest.approx(float(wanted[token]), abs=2e-4)


@torch.no_grad()
def log_probabilities(tenants: Tenants, job: Job) -> torch.Tensor:
    inputs = {"input_ids": torch.tensor([job.prompt]), "use_cache": True}
    if job.tenant == BASE:
        with tenants.model.disable_adapter():
            return tenants.model(**inputs).logits[0, -1].log_softmax(-1)
    tenants.model.set_adapter(job.tenant)
    return tenants.model(**inputs).logits[0, -1].log_softmax(-1)


def test_more_tenants_than_fit(tenants: Tenants) -> None:
    jobs = make_jobs(tenants, 27, new_tokens=10, seed=10)
    llm = start(tenants.base, max_loras=2, max_cpu_loras=3)
    for _ in range(2):
        check(llm, tenants, jobs)
    assert len(manager(llm).list_adapters()) <= 3


def test_an_adapter_is_reloaded_while_its_request_runs(tenants: Tenants) -> None:
    """The running request keeps its vectors; later requests use the new adapter."""
    llm = start(tenants.base)
    prompt = next(prompts(1, seed=12, shortest=20))
    old, new = (tenants.job(name, prompt, 20) for name in ("attention", "mean"))
    engine = llm.llm_engine
    engine.add_request("running", {"prompt_token_ids": prompt}, sampling(20), lora_request=named(tenants, "attention"))
    for _ in range(5):
        engine.step()
    assert engine.add_lora(named(tenants, "mean", load_inplace=True))
    engine.add_request("later", {"prompt_token_ids": prompt}, sampling(20), lora_request=named(tenants, "mean"))
    found = drain(engine)
    assert found == {"running": old.answer, "later": new.answer}
    assert engine.list_loras() == {77}


def named(tenants: Tenants, tenant: str, **options: Any) -> Any:
    """Returns a `LoRARequest` for a tenant's folder, with the same name and id for all tenants."""
    from vllm.lora.request import LoRARequest

    return LoRARequest("shared", 77, str(tenants.folders[tenant]), **options)


def drain(engine: Any) -> dict[str, list[int]]:
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                found[output.request_id] = list(output.outputs[0].token_ids)
    return found


def test_another_folder_under_an_old_name(tenants: Tenants) -> None:
    llm = start(tenants.base)
    for tenant in ("attention", "mean", "up"):
        job = tenants.job(tenant, next(prompts(1, seed=13, shortest=20)), 12)
        (output,) = llm.generate(
            [{"prompt_token_ids": job.prompt}],
            sampling(12),
            lora_request=named(tenants, tenant),
            use_tqdm=False,
        )
        assert list(output.outputs[0].token_ids) == job.answer
        if tenant == "attention":
            assert llm.llm_engine.remove_lora(77)
            assert not llm.llm_engine.list_loras()


def test_slots_of_aborted_requests_are_freed(tenants: Tenants) -> None:
    llm = start(tenants.base)
    engine, jobs = llm.llm_engine, make_jobs(tenants, 16, new_tokens=20, seed=14)
    for index, job in enumerate(jobs):
        engine.add_request(
            str(index), {"prompt_token_ids": job.prompt}, sampling(20), lora_request=tenants.request(job.tenant)
        )
    aborted = {str(index) for index in range(0, 16, 2)}
    for step in range(4):
        if step == 2:
            engine.abort_request([*aborted])
        engine.step()
    found = drain(engine)
    assert found == {str(index): job.answer for index, job in enumerate(jobs) if str(index) not in aborted}
    check(llm, tenants, jobs)


def test_lora_tenants_beside_para_tenants(tenants: Tenants, tmp_path: Path) -> None:
    lora = export_fanlora(tenants.base, tmp_path)
    jobs = [*make_jobs(tenants, 27, new_tokens=12, seed=15)]
    jobs += [Job("lora", prompt, lora_answer(lora, prompt)) for prompt in prompts(9, 16, 40)]
    tenants = replace(tenants, folders={**tenants.folders, "lora": tmp_path})
    llm = start(tenants.base, max_loras=9, max_lora_rank=8, additional_config={"para": {"lora": True}})
    mixed = [jobs[index] for index in torch.randperm(len(jobs), generator=torch.Generator().manual_seed(0)).tolist()]
    for _ in range(2):
        check(llm, tenants, mixed)
    assert {tuple(job.answer) for job in jobs[27:]} - {
        tuple(tenants.answer(BASE, job.prompt, 12)) for job in jobs[27:]
    }


def export_fanlora(base: Path, folder: Path) -> PeftModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapter = get_peft_model(model, FanLoraConfig(r=4, task_type="CAUSAL_LM"))
    randomize(adapter, seed=3, std=0.2)
    export_lora(adapter.eval(), folder)
    return adapter


@torch.no_grad()
def lora_answer(model: PeftModel, prompt: list[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    inputs = torch.tensor([prompt])
    output = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0, max_new_tokens=12
    )
    return output[0, len(prompt) :].tolist()


def test_bfloat16_is_as_near_to_float32_as_in_transformers(tenants: Tenants) -> None:
    llm = start(tenants.base, dtype="bfloat16")
    for name in ("attention", "mean", "rational"):
        base = transformers.AutoModelForCausalLM.from_pretrained(tenants.base, dtype=torch.bfloat16)
        in_bfloat16 = replace(
            tenants, model=PeftModel.from_pretrained(base, tenants.folders[name], adapter_name=name).eval()
        )
        jobs = [Job(name, prompt, []) for prompt in prompts(12, 17, 50)]
        outputs = llm.generate(
            [{"prompt_token_ids": job.prompt} for job in jobs],
            sampling(1, logprobs=20),
            lora_request=[tenants.request(name)] * len(jobs),
            use_tqdm=False,
        )
        found = {"vLLM": [], "transformers": []}
        for job, output in zip(jobs, outputs, strict=True):
            exact, rounded = log_probabilities(tenants, job), log_probabilities(in_bfloat16, job).float()
            for token, of_vllm in output.outputs[0].logprobs[0].items():
                found["vLLM"].append(abs(of_vllm.logprob - float(exact[token])))
                found["transformers"].append(abs(float(rounded[token] - exact[token])))
        distances = {engine: sum(differences) / len(differences) for engine, differences in found.items()}
        assert distances["vLLM"] < 1.5 * distances["transformers"], (name, distances)
