"""Checks at registration that vLLM has the names and signatures that the plugin uses."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any


TESTED = "0.32"
"""The version of vLLM that the plugin was tested with."""

_V1 = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
_V2 = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
_LORA = "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin"
_LINEAR = "vllm.model_executor.layers.linear:"

NAMES: dict[str, tuple[str, ...]] = {
    f"{_LORA}.load_lora_model": ("self", "model", "vllm_config", "device"),
    f"{_LORA}.set_active_loras": ("self", "input_batch", "num_scheduled_tokens", "num_sampled_tokens"),
    f"{_V1}.execute_model": ("self", "scheduler_output"),
    f"{_V2}.finish_requests": ("self", "scheduler_output"),
    f"{_V2}.add_requests": ("self", "scheduler_output"),
    f"{_V2}.prepare_inputs": ("self", "scheduler_output"),
    f"{_LORA}._set_active_loras": ("self", "prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "req_ids",
        "num_scheduled_tokens",
        "num_tokens",
        "num_computed_tokens_np",
    ),
    "vllm.v1.core.sched.output:NewRequestData": ("req_id", "prompt_token_ids", "lora_request"),
    "vllm.v1.core.sched.output:SchedulerOutput": ("finished_req_ids", "preempted_req_ids", "scheduled_new_reqs"),
    "vllm.utils.torch_utils:direct_register_custom_op": (
        "op_name",
        "op_func",
        "mutates_args",
        "fake_impl",
        "target_lib",
    ),
    "vllm.v1.worker.gpu_input_batch:InputBatch.make_lora_inputs": (
        "self",
        "num_scheduled_tokens",
        "num_sampled_tokens",
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._reserve_prefill_lookahead": (
        "self",
        "request",
        "num_computed_tokens",
        "num_new_tokens",
    ),
    "vllm.v1.request:Request.get_skip_reading_prefix_cache": ("self",),
    "vllm.v1.engine.input_processor:InputProcessor.process_inputs": ("self", "request_id", "prompt", "params"),
    "vllm.entrypoints.openai.models.serving:OpenAIServingModels._check_load_lora_adapter_request": ("self", "request"),
    "vllm.entrypoints.serve:create_error_response": ("message", "err_type", "status_code"),
    "vllm.entrypoints.generate.beam_search.offline:BeamSearchOfflineMixin.beam_search": (
        "self",
        "prompts",
        "params",
        "lora_request",
    ),
    "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search": (
        "self",
        "prompt",
        "request_id",
        "params",
        "lora_request",
    ),
    "vllm.lora.layers:LoRAMapping": ("index_mapping", "prompt_mapping", "is_prefill"),
    "vllm.lora.utils:get_adapter_absolute_path": ("lora_path",),
    "vllm.lora.peft_helper:PEFTHelper.from_local_dir": ("lora_path",),
    "vllm.lora.peft_helper:PEFTHelper.validate_legal": ("self", "lora_config"),
    f"{_LINEAR}LinearBase": ("input_size", "output_size"),
    f"{_LINEAR}QKVParallelLinear": (
        "hidden_size",
        "head_size",
        "total_num_heads",
        "total_num_kv_heads",
        "v_head_size",
    ),
    f"{_LINEAR}MergedColumnParallelLinear": ("input_size", "output_sizes"),
    f"{_LINEAR}RowParallelLinear": ("reduce_results",),
    f"{_LINEAR}ReplicatedLinear": ("input_size", "output_size"),
}
"""The functions and classes that the plugin wraps, calls or reads, with the parameters or fields that it uses."""


def problems(names: dict[str, tuple[str, ...]] = NAMES) -> list[str]:
    """Returns one message for each name or parameter that the installed vLLM lacks; empty if it is compatible."""
    found = []
    for name, parameters in names.items():
        try:
            target: Callable[..., Any] = resolve_name(name)
            has = inspect.signature(inspect.unwrap(target)).parameters
        except (ImportError, AttributeError) as error:
            found.append(f"{name} is missing ({error})")
            continue
        if lacking := [parameter for parameter in parameters if parameter not in has]:
            found.append(f"{name} has no parameter {', '.join(map(repr, lacking))}")
    return found


def refusal(found: list[str]) -> str:
    """Returns the error message of an engine with the "para" option on an incompatible vLLM.

    Args:
        found: the messages of `problems`, at least one.
    """
    import vllm

    return (
        f"vLLM {vllm.__version__} is not compatible with peft-fanlora's plugin (tested with {TESTED}): "
        f"{found[0]}{f', and {len(found) - 1} more' if len(found) > 1 else ''}. Install vLLM {TESTED}, or a newer "
        "peft-fanlora."
    )
