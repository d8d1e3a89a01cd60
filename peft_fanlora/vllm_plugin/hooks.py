"""Wrappers around the functions of vLLM that PARA changes.

In an engine without the "para" option, all of them call the original function only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from .options import Options, read_options


def install() -> None:
    """Wraps vLLM's functions. Further calls do nothing."""
    from vllm.entrypoints.generate.beam_search.offline import BeamSearchOfflineMixin
    from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    _wrap(LoRAModelRunnerMixin, "load_lora_model", _load_lora_model)
    _wrap(Scheduler, "add_request", _add_request)
    _wrap(Scheduler, "_reserve_prefill_lookahead", _reserve_prefill_lookahead)
    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(OpenAIServingModels, "_check_load_lora_adapter_request", _check_load_lora_adapter_request)
    _wrap(BeamSearchOfflineMixin, "beam_search", _beam_search_offline)
    _wrap(BeamSearchOnlineMixin, "beam_search", _beam_search_online)


def refuse(message: str) -> None:
    """Makes engines with the "para" option fail at startup with an `ImportError`.

    Args:
        message: the message of the error.
    """
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    def load_lora_model(original: Any, runner: Any, model: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if _options(vllm_config) is not None:
            raise ImportError(message)
        return original(runner, model, vllm_config, *args, **kwargs)

    _wrap(LoRAModelRunnerMixin, "load_lora_model", load_lora_model)


def _wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    if hasattr(original, "serves_para"):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return around(original, *args, **kwargs)

    wrapped.serves_para = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _options(vllm_config: Any) -> Options | None:
    return read_options(vllm_config.additional_config)


# Worker


def _load_lora_model(original: Any, runner: Any, model: Any, vllm_config: Any, device: Any) -> Any:
    options = _options(vllm_config)
    if options is None:
        return original(runner, model, vllm_config, device)
    from . import worker

    return worker.load(original, runner, model, vllm_config, device, options)


# Engine core


def _add_request(original: Any, scheduler: Any, request: Any) -> Any:
    from . import scheduling

    scheduling.mark(scheduler, request)
    return original(scheduler, request)


def _reserve_prefill_lookahead(
    original: Any, scheduler: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
) -> Any:
    from . import scheduling

    num_new_tokens = original(scheduler, request, num_computed_tokens, num_new_tokens)
    return scheduling.whole_prompt(request, num_computed_tokens, num_new_tokens)


# Front end


def _front(processor: Any) -> Any:
    """Returns the `Front` of an input processor, created at the first call; None if the engine does not serve PARA."""
    options = _options(processor.vllm_config)
    if options is None:
        return None
    from .front import Front

    if not isinstance(getattr(processor, "para_front", None), Front):
        processor.para_front = Front(processor.vllm_config, options)
    return processor.para_front


def _process_inputs(original: Any, processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    front = _front(processor)
    if front is not None and request.lora_request is not None and front.check_adapter(request.lora_request):
        front.check_request(request)
    return request


async def _check_load_lora_adapter_request(original: Any, models: Any, request: Any) -> Any:
    refusal = await original(models, request)
    front = _front(models.engine_client.input_processor)
    if refusal is not None or front is None:
        return refusal
    from vllm.entrypoints.serve import create_error_response
    from vllm.lora.request import LoRARequest

    from .front import RefusedRequest

    try:
        front.check_adapter(LoRARequest(request.lora_name, 1, request.lora_path))
    except RefusedRequest as error:
        return create_error_response(
            message=str(error), err_type="BadRequestError", status_code=HTTPStatus.BAD_REQUEST
        )
    return None


def _beam_search_offline(
    original: Any, llm: Any, prompts: Any, params: Any, lora_request: Any = None, *args: Any, **kwargs: Any
) -> Any:
    requests = lora_request if isinstance(lora_request, (list, tuple)) else [lora_request]
    _refuse_beams(llm.llm_engine.input_processor, requests)
    return original(llm, prompts, params, lora_request, *args, **kwargs)


def _beam_search_online(
    original: Any,
    serving: Any,
    prompt: Any,
    request_id: Any,
    params: Any,
    lora_request: Any = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    _refuse_beams(serving.engine_client.input_processor, [lora_request])
    return original(serving, prompt, request_id, params, lora_request, *args, **kwargs)


def _refuse_beams(processor: Any, requests: Any) -> None:
    front = _front(processor)
    if front is not None and any(request is not None and front.check_adapter(request) for request in requests):
        from .front import BEAM_SEARCH_REFUSAL, RefusedRequest

        raise RefusedRequest(BEAM_SEARCH_REFUSAL)
