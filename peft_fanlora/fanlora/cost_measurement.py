"""Measures the time that LoRA modules add to a decoding step, in transformers or in vLLM."""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from tqdm.auto import tqdm

from ..timing import BASE, Contestant, Stopwatch, decode_steps, in_turns, summaries, twin, with_tenants
from .arguments import check_count
from .candidates import candidates, num_parameters_per_rank
from .choices import Engine
from .config import FanLoraConfig
from .costs import ModuleCosts, fit
from .export import export_lora
from .knapsack import import_scipy
from .modules import ModuleName, vllm_layers
from .setting import FanLoraSetting


_PROMPT_LENGTH = 64
_KV_CACHE_BYTES = 2**30
"""The most that the KV cache of a vLLM engine may take."""


def module_costs(
    model: nn.Module, engine: Engine = "transformers", *, r: int = 8, tenants: int = 8, rounds: int = 40
) -> ModuleCosts:
    """Measures the time of LoRA modules in a decoding step on this machine, for `ImportanceScores.select`.

    The base model and models with LoRA on all modules, on those of the even layers, and on each quarter of them by size
    take one step each per round, in random order. The costs are fitted to the medians of the ratios to the base
    model; `ModuleCosts.error` is the largest error of predicting one of these ratios from the others.

    Args:
        model: a causal language model, with or without adapters, which are not used.
        engine: "transformers" for FanLoRA adapters in one batch, "vllm" for exported adapters. vLLM loads
            `model.config.name_or_path` once for each of the seven variants, which must fit into memory together; on a
            CPU they share their weights.
        r: the rank of the adapters.
        tenants: the number of adapters in a batch, one row each.
        rounds: the number of steps of each variant.

    Raises:
        ValueError: the engine is unknown, a number is too small, or the model has fewer than four modules (or
            packed layers of vLLM).
        ModuleNotFoundError: SciPy or vLLM is missing.

    Examples:
        >>> costs = module_costs(model)
        >>> setting = scores.select(max_slowdown=1.05, costs=costs)
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine={engine!r} is unknown; use one of {', '.join(get_args(Engine))}.")
    for argument, value, least in (("r", r, 1), ("tenants", tenants, 1), ("rounds", rounds, 2)):
        check_count(argument, value, least)
    import_scipy()
    base = twin(model)
    if isinstance(base, PeftModel):
        base = base.unload()
    base.eval()
    parameters = {name: r * num_parameters_per_rank(module) for name, module in candidates(base).items()}
    unmeasured = ModuleCosts(engine, 0.0, 0.0, 0.0, parameters, 0.0)
    samples = _samples(unmeasured)
    with _same_requires_grad(model):
        base_ms, ratios = step_times(base, engine, samples, r=r, tenants=tenants, rounds=rounds)
    device = next(base.parameters()).device.type
    return fit(
        engine,
        parameters,
        [(*unmeasured.size(names), ratio) for names, ratio in zip(samples, ratios, strict=True)],
        {
            "r": r,
            "tenants": tenants,
            "rounds": rounds,
            "base_ms": base_ms,
            "device": device,
            "threads": torch.get_num_threads(),
        },
    )


@contextmanager
def _same_requires_grad(model: nn.Module) -> Iterator[None]:
    """Restores which parameters require gradients: the timed models share them, and PEFT freezes them."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad = flag


def step_times(
    base: nn.Module, engine: Engine, samples: Sequence[Sequence[str]], *, r: int, tenants: int, rounds: int
) -> tuple[float, list[float]]:
    """Returns the base model's step in milliseconds, and the median ratio to it of steps with LoRA on each sample.

    Args:
        base: a causal language model without adapters.
        engine: the engine to time.
        samples: the names of the adapted modules of each variant.
        r: the rank of the adapters.
        tenants: the number of adapters in a batch, one row each.
        rounds: the number of steps of each variant.
    """
    measure = _in_transformers if engine == "transformers" else _in_vllm
    return measure(base, samples, r, tenants, rounds)


def _samples(costs: ModuleCosts) -> list[list[str]]:
    """Returns the modules of each timed variant: sets that differ in the number of modules and in their size."""
    units = sorted(costs.units().values(), key=lambda members: sum(costs.parameters[name] for name in members))
    if len(units) < 4:
        raise ValueError(f"The model has {len(units)} module(s) to choose from; costs need at least four.")
    even = [members for members in units if ModuleName.parse(members[0]).layer % 2 == 0]
    bounds = [len(units) * quarter // 4 for quarter in range(5)]
    quarters = [units[first:last] for first, last in itertools.pairwise(bounds)]
    return [[name for members in chosen for name in members] for chosen in (units, even, *quarters)]


def _in_transformers(
    base: nn.Module, samples: Sequence[Sequence[str]], r: int, tenants: int, rounds: int
) -> tuple[float, list[float]]:
    device = next(base.parameters()).device
    names = [f"tenant{number}" for number in range(tenants)]
    contestants = [Contestant(BASE, base)]
    for number, modules in enumerate(samples):
        config = FanLoraConfig(r=r, setting=FanLoraSetting.from_modules(base, modules), task_type="CAUSAL_LM")
        adapted = with_tenants(twin(base), config, names)
        contestants.append(Contestant(str(number), adapted, {"adapter_names": names} if tenants > 1 else {}))
    vocabulary: int = base.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    seconds = decode_steps(
        contestants,
        tqdm(range(rounds), "Timing", leave=False),
        lambda: torch.randint(0, vocabulary, (tenants, _PROMPT_LENGTH), device=device),
        Stopwatch(str(device)),
    )
    first, *others = summaries(seconds)
    return first["median_ms"], [summary["ratio"] for summary in others]


def _in_vllm(
    base: nn.Module, samples: Sequence[Sequence[str]], r: int, tenants: int, rounds: int
) -> tuple[float, list[float]]:
    in_this_process = patch.dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0")  # where engines can take turns
    with tempfile.TemporaryDirectory() as folder, in_this_process:
        engines = [Contestant(BASE, _engine(base, rounds, tenants, enable_lora=False))]
        for number, modules in enumerate(samples):
            saved = Path(folder, str(number))
            config = FanLoraConfig(r=r, setting=FanLoraSetting.from_modules(base, modules), task_type="CAUSAL_LM")
            export_lora(get_peft_model(twin(base), config), saved)
            lora = {"enable_lora": True, "max_loras": tenants, "max_lora_rank": _max_lora_rank(r)}
            engine = _engine(base, rounds, tenants, lora_target_modules=vllm_layers(modules), **lora)
            _share_weights(engines[0].model, engine)
            engines.append(Contestant(str(number), engine, {"folder": str(saved), "tenants": tenants}))
        for contestant in engines:
            _add_requests(contestant, tenants, rounds)
        stopwatch = Stopwatch("cpu")  # a step ends when its tokens are on the CPU
        cores: dict[str, Any] = {engine.name: engine.model.llm_engine for engine in engines}
        seconds = in_turns(
            engines, tqdm(range(rounds), "Timing", leave=False), lambda engine: stopwatch(cores[engine.name].step)
        )
    first, *others = summaries(seconds)
    return first["median_ms"], [summary["ratio"] for summary in others]


def _engine(base: Any, rounds: int, tenants: int, **lora: Any) -> Any:
    try:
        from vllm import LLM
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "engine='vllm' times vLLM, which is not installed here: call module_costs in vLLM's environment, save the "
            "result and load it here."
        ) from error
    length = _PROMPT_LENGTH + rounds + 16
    return LLM(
        base.config.name_or_path,
        dtype=str(base.dtype).removeprefix("torch."),
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        async_scheduling=False,
        max_model_len=length,
        max_num_seqs=tenants,
        enforce_eager=current_platform.is_cpu(),  # where vLLM compiles no model with adapters
        kv_cache_memory_bytes=_KV_CACHE_BYTES,
        num_gpu_blocks_override=tenants * (length // 16 + 1),  # a block has at least 16 tokens
        **lora,
    )


def _share_weights(engine: Any, other: Any) -> None:
    """Lets another engine use the base weights of the first one, if both are in eager mode.

    On a CPU, the time of a step depends on where the weights are in memory: the steps of two engines without adapters
    differ by up to 5%.
    """
    if not engine.llm_engine.vllm_config.model_config.enforce_eager:  # CUDA graphs have the addresses of the weights
        return
    models: list[Any] = []
    for each in (engine, other):
        each.apply_model(models.append)
    weights, adapted = (dict(model.named_modules()) for model in models)
    for name, module in adapted.items():
        source: Any = weights.get(name.replace(".base_layer", ""))
        if type(source) is type(module):
            module._parameters = source._parameters
            if hasattr(source, "cpu_linear"):  # vLLM's product with a packed copy of the weights
                module.cpu_linear = source.cpu_linear


def _max_lora_rank(r: int) -> int:
    """Returns the smallest `max_lora_rank` that vLLM accepts for adapters of rank r."""
    from vllm.config.lora import MaxLoRARanks

    return min(rank for rank in get_args(MaxLoRARanks) if rank >= r)


def _add_requests(contestant: Contestant, tenants: int, rounds: int) -> None:
    """Starts one request per tenant and computes the prompts."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    engine: Any = contestant.model.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=rounds + 8, ignore_eos=True, detokenize=False)
    for number in range(1, tenants + 1):
        folder = contestant.call.get("folder")
        request = LoRARequest(f"{folder}-{number}", number, folder) if folder else None
        prompt = {"prompt_token_ids": [3 + number] * _PROMPT_LENGTH}
        engine.add_request(str(number), prompt, sampling, lora_request=request)
    for _ in range(3):
        engine.step()
