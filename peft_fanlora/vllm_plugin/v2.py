"""Connects the manager to vLLM's model runner V2."""

from __future__ import annotations

from typing import Any

from .manager import ParaManager
from .tenants import prompt_length
from .vectors import Row


def attach(runner: Any, manager: ParaManager) -> None:
    """Wraps four methods of a runner, so that each step frees and assigns slots.

    Args:
        runner: a `vllm.v1.worker.gpu.model_runner.GPUModelRunner`.
        manager: the manager of its adapters.
    """
    finish_requests, add_requests = runner.finish_requests, runner.add_requests
    prepare_inputs, activate = runner.prepare_inputs, runner._set_active_loras
    known: dict[str, Any] = {}
    begun: list[list[Row]] = []

    def finish(scheduler_output: Any) -> None:
        finish_requests(scheduler_output)
        for request in {*scheduler_output.finished_req_ids, *(scheduler_output.preempted_req_ids or ())}:
            manager.vectors.release([request])
            known.pop(request, None)

    def add(scheduler_output: Any) -> None:
        known.update({request.req_id: request for request in scheduler_output.scheduled_new_reqs})
        add_requests(scheduler_output)

    def prepare(*args: Any, **kwargs: Any) -> Any:
        batch = prepare_inputs(*args, **kwargs)
        begun[:] = [_rows(batch, known, manager)]
        return batch

    def set_active_loras(of_samples: Any, of_tokens: Any, requests: Any, *args: Any, **kwargs: Any) -> None:
        if begun:  # empty in a warm-up step
            manager.begin(begun.pop(), manager.lora_inputs(of_samples, of_tokens, requests))
        else:
            activate(of_samples, of_tokens, requests, *args, **kwargs)

    runner.finish_requests, runner.add_requests = finish, add
    runner.prepare_inputs, runner._set_active_loras = prepare, set_active_loras


def _rows(batch: Any, known: dict[str, Any], manager: ParaManager) -> list[Row]:
    num_tokens = batch.num_scheduled_tokens.tolist()
    if batch.num_tokens < sum(num_tokens):
        raise RuntimeError(
            f"The batch has {batch.num_tokens} of the {sum(num_tokens)} scheduled tokens: vLLM dropped draft tokens "
            "on the GPU, so that PARA cannot map tokens to requests: set enable_adaptive_verification to False in "
            "speculative_config."
        )
    rows = []
    for index, (request, tokens) in enumerate(zip(batch.req_ids, num_tokens, strict=True)):
        tenant, prompt = manager.tenant(known[request].lora_request), 0
        if tenant is not None and batch.num_computed_tokens_np[index] == 0:
            prompt = prompt_length(known[request].prompt_token_ids, tenant.prompt_end)
        rows.append(Row(request, tenant, tokens, prompt))
    return rows
