"""Prepares a worker of vLLM for PARA once its model is loaded."""

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
    """Gives a runner a manager for PARA in the place of vLLM's LoRA manager.

    Args:
        load_lora_model: vLLM's own method, which makes the LoRA manager.
        runner: the model runner.
        model: the loaded model.
        vllm_config: the engine's configuration.
        device: where the engine computes.
        options: what the engine was asked to do for PARA.

    Returns:
        The model to run.

    Raises:
        ValueError: the engine does something that PARA cannot do.
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
    """Lets vLLM prepare the model for LoRA.

    On a CPU it reads the last slot for rows without LoRA (vllm#48421): one more slot than adapters stays empty there.
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
    """Raises where the engine cannot serve PARA exactly."""
    config, parallel = vllm_config.model_config, vllm_config.parallel_config
    unfit = compiled.refusal(vllm_config.compilation_config, current_platform.is_cpu())
    cases = {
        "the model computes attention from compressed keys (MLA), whose projections are not all layers": config.use_mla,
        "the model has recurrent layers beside attention (Mamba)": config.is_hybrid or config.is_attention_free,
        "the model is an encoder-decoder, whose prompt the encoder reads": config.is_encoder_decoder,
        "pipeline_parallel_size splits the model's blocks": parallel.pipeline_parallel_size > 1,
        "prefill_context_parallel_size splits prompts": parallel.prefill_context_parallel_size > 1,
        "enable_dbo splits steps": parallel.enable_dbo,
        "kv_sharing_fast_prefill skips prompt tokens in some layers": vllm_config.cache_config.kv_sharing_fast_prefill,
        "kv_transfer_config brings prompts that were computed elsewhere": vllm_config.kv_transfer_config is not None,
        "VLLM_USE_RUST_FRONTEND goes around the checks of requests": _is_set("VLLM_USE_RUST_FRONTEND"),
    }
    if unfit is not None:
        cases[unfit] = True
    for reason, applies in cases.items():
        if applies:
            raise ValueError(f"This engine cannot serve PARA: {reason}. Serve with transformers, or change that.")
    if not supports_lora(model):
        raise ValueError(f"This engine cannot serve PARA: vLLM gives {type(model).__name__} no adapters.")


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "0") not in ("", "0")
