"""Engines that need a separate process: `python scenarios.py NAME FOLDER` prints the result as JSON.

vLLM has state per process: speculative decoding and compilation change it, tensor parallelism starts worker processes,
and the second model runner needs Triton.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from integration_tests.vllm_engine.para_engines import (
    BASE,
    answers,
    check_alive,
    count_misses,
    make_base,
    make_jobs,
    make_tenants,
    manager,
    start,
)


def run(
    folder: Path,
    base_options: dict[str, Any],
    count: int,
    new_tokens: int,
    seed: int,
    prepare: Callable[[Any], Any] = id,
    **options: Any,
) -> Any:
    """Serves jobs twice and returns the engine, and the number of tokens and of those that differ from transformers.

    Args:
        folder: where the model and the adapters are saved.
        base_options: config values of the base model.
        count: number of jobs.
        new_tokens: tokens of each answer.
        seed: seed of the prompts.
        prepare: called with the engine before the jobs.
        **options: options of the engine.
    """
    base = make_base(folder / "base", **base_options)
    tenants = make_tenants(base, folder / "tenants")
    jobs = make_jobs(tenants, count, new_tokens, seed)
    llm = start(base, **options)
    prepare(llm)
    misses = sum(count_misses(answers(llm, tenants, jobs), jobs) for _ in range(2))
    return llm, {"misses": misses, "tokens": 2 * count * new_tokens}


def drafts(llm: Any) -> dict[str, int]:
    """Returns the number of drafted and of accepted tokens."""
    counts = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {
        "drafted": int(counts["vllm:spec_decode_num_draft_tokens"]),
        "accepted": int(counts["vllm:spec_decode_num_accepted_tokens"]),
    }


def ngram(folder: Path) -> dict[str, Any]:
    """Speculative decoding with n-grams of the prompt and the answer."""
    lookup = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
    speculation = {"method": "ngram", "num_speculative_tokens": 3, **lookup}
    llm, found = run(folder, {}, 27, 40, 9, speculative_config=speculation, disable_log_stats=False)
    return found | drafts(llm)


def draft_model(folder: Path) -> dict[str, Any]:
    """Speculative decoding with a draft model, which has no adapters."""
    draft = make_base(folder / "draft", num_hidden_layers=1)
    speculation = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2}
    llm, found = run(folder, {}, 27, 20, 9, speculative_config=speculation, disable_log_stats=False)
    return found | drafts(llm)


def two_ranks(folder: Path, **base_options: Any) -> dict[str, Any]:
    """Two tensor-parallel ranks, each with its own key and value heads."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    return run(folder, base_options, 27, 12, 3, tensor_parallel_size=2)[1]


def two_ranks_share_heads(folder: Path) -> dict[str, Any]:
    """Two tensor-parallel ranks with a replicated key and value head."""
    return two_ranks(folder, num_key_value_heads=1)


def count_operators(llm: Any) -> Counter[str]:
    """Returns a counter of the calls of the operator for compiled models, by layer."""
    (layers,) = llm.collective_rpc(lambda worker: worker.vllm_config.compilation_config.static_forward_context)
    calls: Counter[str] = Counter()

    def counted(name: str, scale: Callable[..., None]) -> Callable[..., None]:
        def call(*tensors: Any) -> None:
            calls[name] += 1
            scale(*tensors)

        return call

    for name in [name for name in layers if name.startswith("para.")]:
        layers[name] = counted(name, layers[name])
    return calls


def let_cpus_compile_with_adapters() -> None:
    """Enables compilation for LoRA on CPUs, where vLLM disables it, so that it is tested without a GPU."""
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def update_without_adapters(platform: type, vllm_config: Any) -> None:
        adapters, vllm_config.lora_config = vllm_config.lora_config, None
        update(vllm_config)
        vllm_config.lora_config = adapters

    CpuPlatform.check_and_update_config = classmethod(update_without_adapters)


def compiled(folder: Path) -> dict[str, Any]:
    """A compiled model, with the settings that vLLM uses for models without adapters on a CPU."""
    let_cpus_compile_with_adapters()
    counts: list[Counter[str]] = []
    llm, found = run(
        folder, {}, 27, 16, 5, prepare=lambda llm: counts.append(count_operators(llm)), enforce_eager=False
    )
    (config,) = llm.collective_rpc(lambda worker: worker.vllm_config.compilation_config)
    return found | {
        "layers": len(counts[0]),
        "calls": sum(counts[0].values()),
        "mode": str(config.mode),
        "split": config.splitting_ops,
    }


def second_runner(folder: Path) -> dict[str, Any]:
    """vLLM's second model runner, which needs Triton, with few KV cache blocks, so that requests are preempted."""
    llm, found = run(folder, {}, 18, 40, 5, num_gpu_blocks_override=14, block_size=32)
    (runner,) = llm.collective_rpc(lambda worker: type(worker.model_runner).__module__)
    return found | {"runner": runner}


def soak(folder: Path, requests: int = 5_000, at_once: int = 100) -> dict[str, Any]:
    """5,000 requests of 40 tenants, of which four are in a batch and eight in memory, so that tenants come and go."""
    base = make_base(folder / "base")
    tenants = make_tenants(base, folder / "tenants")
    jobs = make_jobs(tenants, 45, 8, seed=13)
    llm = start(base, max_loras=4, max_cpu_loras=8, max_num_seqs=32, kv_cache_memory_bytes=2**26)
    process, loads, memory, misses = psutil.Process(), Counter[str](), [], 0
    add = manager(llm).add_adapter

    def counting(request: Any) -> bool:
        loads["adapters"] += 1
        return add(request)

    manager(llm).add_adapter = counting
    for first in range(0, requests, at_once):
        chunk = [jobs[(first + index) % len(jobs)] for index in range(at_once)]
        copies = [(first + index) // 7 % 5 for index in range(at_once)]
        misses += count_misses(answers(llm, tenants, chunk, copies), chunk)
        memory.append(process.memory_info().rss)
    check_alive(llm, tenants, [tenants.job(BASE, jobs[0].prompt, 2)])
    warm = requests // at_once // 5
    return {
        "misses": misses,
        "tokens": requests * 8,
        "loads": loads["adapters"],
        "slots": len(manager(llm).vectors.slots),
        "adapters": len(manager(llm).list_adapters()),
        "megabytes": [round(memory[index] / 2**20) for index in (0, warm, -1)],
    }


if __name__ == "__main__":
    name, place = sys.argv[1:]
    print("RESULT " + json.dumps(globals()[name](Path(place))), flush=True)
    os._exit(0)  # does not wait for worker processes and threads of vLLM
