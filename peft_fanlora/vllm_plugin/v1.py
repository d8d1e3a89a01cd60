"""Connects the manager to vLLM's model runner V1."""

from __future__ import annotations

from typing import Any

from .manager import ParaManager
from .tenants import prompt_length
from .vectors import Row


def attach(runner: Any, manager: ParaManager) -> None:
    """Wraps two methods of a runner, so that each step frees and assigns slots.

    Args:
        runner: a `vllm.v1.worker.gpu_model_runner.GPUModelRunner`.
        manager: the manager of its adapters.
    """
    execute_model = runner.execute_model

    def releasing(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        manager.vectors.release(scheduler_output.finished_req_ids)
        manager.vectors.release(scheduler_output.preempted_req_ids or ())
        return execute_model(scheduler_output, *args, **kwargs)

    def set_active_loras(
        input_batch: Any, num_scheduled_tokens: Any, num_sampled_tokens: Any = None, *args: Any, **kwargs: Any
    ) -> None:
        rows = _rows(input_batch, num_scheduled_tokens.tolist(), manager)
        sampled = num_scheduled_tokens.clip(max=1) if num_sampled_tokens is None else num_sampled_tokens
        lora = manager.lora_inputs(*input_batch.make_lora_inputs(num_scheduled_tokens, sampled))
        manager.begin(rows, lora)

    runner.execute_model = releasing
    runner.set_active_loras = set_active_loras


def _rows(batch: Any, num_tokens: list[int], manager: ParaManager) -> list[Row]:
    rows = []
    for index, (request, tokens) in enumerate(zip(batch.req_ids, num_tokens, strict=True)):
        tenant = manager.tenant(batch.lora_id_to_lora_request.get(int(batch.request_lora_mapping[index])))
        prompt = 0
        if tenant is not None and batch.num_computed_tokens_cpu[index] == 0:
            prompt = prompt_length(
                batch.token_ids_cpu[index, : batch.num_prompt_tokens[index]].tolist(), tenant.prompt_end
            )
        rows.append(Row(request, tenant, tokens, prompt))
    return rows
