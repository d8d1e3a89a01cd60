"""Scheduling for methods that need the whole prompt: continuous batching does not split prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers.generation.continuous_batching import RequestState, RequestStatus


def keep_prompts_whole(scheduler: Any, note: Callable[[Exception], None]) -> None:
    """Makes a scheduler start a prompt only in a step that has room for all of it."""
    process, wait = scheduler._process_candidates, scheduler.add_waiting_request

    def begins(state: RequestState) -> bool:
        return state.position_offset == 0 and not state._true_initial_tokens

    def process_candidates(candidates: list[RequestState], token_budget: int, *args: Any) -> Any:
        admitted, left = [], token_budget
        for state in candidates:
            is_decoding = state.status == RequestStatus.DECODING
            num_tokens = len(state.tokens_to_process if is_decoding else state.remaining_prefill_tokens)
            if begins(state) and num_tokens > left:
                break  # otherwise shorter prompts could delay this one indefinitely
            admitted.append(state)
            left -= num_tokens
        return process(admitted, token_budget, *args)

    def add_waiting_request(state: RequestState) -> None:
        room = scheduler.cache.max_batch_tokens
        if begins(state) and len(state.initial_tokens) > room:
            error = ValueError(
                f"A prompt has {len(state.initial_tokens)} tokens, but a step has room for {room}: PARA needs the "
                "whole prompt in one step, so increase max_batch_tokens in the ContinuousBatchingConfig."
            )
            note(error)
            raise error
        wait(state)

    scheduler._process_candidates = process_candidates
    scheduler.add_waiting_request = add_waiting_request
