"""How vLLM's scheduler treats the requests of PARA adapters."""

from __future__ import annotations

from typing import Any

from .folders import is_para
from .options import read_options


MARK = "needs_whole_prompt"


def mark(scheduler: Any, request: Any) -> None:
    """Marks a new request of a PARA adapter, and keeps it from reading the prefix cache.

    Its vectors are made from the whole prompt, of which a cached beginning would be missing.
    """
    if read_options(scheduler.vllm_config.additional_config) is not None and is_para(request.lora_request):
        request.skip_reading_prefix_cache = True
        setattr(request, MARK, True)


def whole_prompt(request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
    """Returns how many tokens of a request to compute in a step: of a marked one the whole prompt or none of it.

    A block's input depends on the vectors of the blocks before, so that a prompt in pieces has no exact vectors.
    """
    is_part = num_computed_tokens + num_new_tokens < request.num_prompt_tokens
    return 0 if is_part and getattr(request, MARK, False) else num_new_tokens
