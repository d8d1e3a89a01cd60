"""Scheduling of requests for PARA adapters."""

from __future__ import annotations

from typing import Any

from .folders import is_para
from .options import read_options


MARK = "needs_whole_prompt"


def mark(scheduler: Any, request: Any) -> None:
    """Marks a new request if it is for a PARA adapter, and disables reading the prefix cache for it.

    The generators need the hidden states of the whole prompt, which are not computed for a cached prefix.
    """
    if read_options(scheduler.vllm_config.additional_config) is not None and is_para(request.lora_request):
        request.skip_reading_prefix_cache = True
        setattr(request, MARK, True)


def whole_prompt(request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Returns the number of tokens to schedule in a step: 0 instead of a part of a marked request's prompt.

    The input of a block depends on the vectors of earlier blocks, so a chunk of a prompt cannot be computed exactly.

    Args:
        request: the request.
        num_computed_tokens: number of its tokens that earlier steps computed.
        num_new_tokens: number of tokens that vLLM would schedule.
    """
    is_part = num_computed_tokens + num_new_tokens < request.num_prompt_tokens
    return 0 if is_part and getattr(request, MARK, False) else num_new_tokens
