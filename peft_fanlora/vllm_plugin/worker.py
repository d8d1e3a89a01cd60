"""Installs PARA in a worker after its model was loaded."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models import supports_lora
from vllm.platforms import current_platform

from . import compiled, v1, v2
from .manager import ParaManager
from .options import Options


def load(
    load_lora_model: Callable[..., nn.Module],
    runner: Any,
    model: nn.Module,
    vllm_config: Any,
    device: torch.device,
    options: Options,
) -> nn.Module:
    """Sets a `ParaManager` as the LoRA manager of a model runner.

    Args:
        load_lora_model: the original method of the runner, which creates vLLM's LoRA manager.
        runner: the model runner.
        model: the loaded model.
        vllm_config: configuration of the engine.
        device: device of the engine.
        options: its PARA options.

    Returns:
        The model, with LoRA layers if `options.lora` is set.

    Raises:
        ValueError: the engine has an option, or the model a feature, that PARA does not support.
    """
    _check(vllm_config, model)
    lora = None
    if options.lora:
        model = _load_lora(load_lora_model, runner, model, vllm_config, device)
        lora = runner.lora_manager
    runner.lora_manager = ParaManager(vllm_config, model, device, lora)
    (v2 if vllm_config.use_v2_model_runner else v1).attach(runner, runner.lora_manager)
    return model


def _load_lora(
    load_lora_model: Callable[..., nn.Module], runner: Any, model: nn.Module, vllm_config: Any, device: torch.device
) -> nn.Module:
    """Calls vLLM's `load_lora_model` and returns the model with LoRA layers.

    vLLM's CPU kernels apply the last slot to rows without an adapter (vllm#48421), so one more slot is allocated on
    CPUs and stays empty.
    """
    if not current_platform.is_cpu():
        return load_lora_model(runner, model, vllm_config, device)
    lora_config = vllm_config.lora_config
    more = replace(vllm_config.lora_config)
    more.max_loras += 1
    more.max_cpu_loras += 1
    vllm_config.lora_config = more
    try:
        model = load_lora_model(runner, model, vllm_config, device)
    finally:
        vllm_config.lora_config = lora_config
    runner.lora_manager.lora_config = lora_config
    runner.lora_manager._adapter_manager.lora_config = lora_config
    return model


def _check(vllm_config: Any, model: nn.Module) -> None:
    """Raises a `ValueError` if the engine cannot serve PARA exactly."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    unfit = compiled.refusal(vllm_config.compilation_config, current_platform.is_cpu())
    cases = {
        "some projections of compressed attention (MLA) are not computed by a linear layer": config.use_mla,
        "the model has recurrent layers (Mamba)": config.is_hybrid or config.is_attention_free,
        "the prompt of an encoder-decoder model is computed by the encoder": config.is_encoder_decoder,
        "pipeline_parallel_size > 1 splits the blocks between workers": parallel.pipeline_parallel_size > 1,
        "prefill_context_parallel_size > 1 splits prompts between ranks": parallel.prefill_context_parallel_size > 1,
        "enable_dbo splits a step into two batches": parallel.enable_dbo,
        "kv_sharing_fast_prefill skips prompt tokens in some layers": vllm_config.cache_config.kv_sharing_fast_prefill,
        "kv_transfer_config may skip prompts computed elsewhere": vllm_config.kv_transfer_config is not None,
        # The tables are allocated while the model is loaded, so they belong to the memory that sleep level 2 discards.
        "enable_sleep_mode may discard the vectors, and wrong ones are read after waking up": config.enable_sleep_mode,
        "VLLM_USE_RUST_FRONTEND skips the plugin's checks of requests": _is_set("VLLM_USE_RUST_FRONTEND"),
    }
    if unfit is not None:
        cases[unfit] = True
    for reason, applies in cases.items():
        if applies:
            raise ValueError(f"This engine cannot serve PARA: {reason}. Change this, or serve with transformers.")
    if not supports_lora(model):
        raise ValueError(
            f"This engine cannot serve PARA: vLLM does not support adapters for {type(model).__name__}. Serve with "
            "transformers."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")
