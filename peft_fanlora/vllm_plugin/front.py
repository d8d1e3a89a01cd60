"""Checks requests and adapter folders before they reach the engine core, so that a bad one does not affect others."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
import transformers
from vllm.config import set_current_vllm_config
from vllm.exceptions import VLLMValidationError
from vllm.lora.peft_helper import PEFTHelper

from .folders import State, peft_type_in, resolve, state_of
from .options import Options
from .tenants import TenantError, check_blocks, linear_shapes, read_blocks, read_config


class RefusedRequest(VLLMValidationError, ValueError):
    """Raised for a request or adapter that cannot be served; vLLM's server returns HTTP 400."""


class Front:
    """Checks the requests and adapter folders of one engine.

    Args:
        vllm_config: configuration of the engine.
        options: its PARA options.
    """

    def __init__(self, vllm_config: Any, options: Options) -> None:
        self.config = vllm_config
        self.options = options
        self.checked = lru_cache(maxsize=4096)(self._check)
        self._shapes: dict[str, tuple[int, int]] | None = None

    def check_adapter(self, request: Any) -> bool:
        """Returns whether a `LoRARequest` names a PARA adapter.

        Raises:
            RefusedRequest: this engine cannot serve the adapter.
        """
        try:
            folder = resolve(request.lora_path)
            return bool(self.checked(folder, state_of(folder)))
        except RefusedRequest:
            raise
        except (ValueError, OSError) as error:
            raise RefusedRequest(f"The adapter {request.lora_name!r} cannot be served. {error}") from error

    def _check(self, folder: str, state: State) -> bool:
        method = peft_type_in(folder, state)
        if method == "PARA":
            config = read_config(folder)
            check_blocks(
                read_blocks(folder, shapes_only=True), config, self.shapes, self.config.model_config.hf_config, folder
            )
            return True
        if method != "LORA":
            way = "export it with export_lora" if method == "FANLORA" else "pass a LoRA or PARA adapter"
            raise TenantError(f"{folder!r} has peft_type {method!r}, which this engine cannot serve: {way}.")
        if not self.options.lora:
            raise TenantError(
                f"{folder!r} is a LoRA adapter, but this engine serves only PARA: start it with "
                'additional_config={"para": {"lora": true}}.'
            )
        if state[1] is None:
            raise TenantError(f"{folder!r} has no adapter_model.safetensors: save the adapter again.")
        PEFTHelper.from_local_dir(folder, None).validate_legal(self.config.lora_config)
        return False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The (inputs, outputs) of each linear layer of the served model, by its name in transformers."""
        if self._shapes is None:
            config = copy.deepcopy(self.config.model_config.hf_config)
            architecture = next(iter(getattr(config, "architectures", None) or ()), "")
            model_class: Any = getattr(transformers, architecture, None)
            if model_class is None:
                raise TenantError(
                    f"transformers has no model class {architecture!r}, so that adapters cannot be checked against "
                    "the served model: install a version of transformers that has it."
                )
            # vLLM's Transformers backend patches these classes if the engine runs in this process.
            with set_current_vllm_config(self.config), torch.device("meta"):
                self._shapes = linear_shapes(model_class(config))
        return self._shapes

    def check_request(self, request: Any) -> None:
        """Checks a processed request for a PARA adapter.

        Raises:
            RefusedRequest: the request has a feature that PARA does not support, or a prompt that does not fit into
                one step.
        """
        if request.pooling_params is not None:
            raise RefusedRequest("PARA adapters do not support pooling requests: send it to the base model.")
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise RefusedRequest(
                "PARA adapters do not support prompt_embeds, since they need the token ids: pass text or token ids."
            )
        if request.mm_features:
            raise RefusedRequest(
                "PARA adapters support only text: send requests with images or audio to the base model."
            )
        if request.resumable:
            raise RefusedRequest(
                "This request streams its input, but PARA adapters need the complete prompt: send it in one piece."
            )
        length, limit, option = len(request.prompt_token_ids), *self._longest_prompt()
        if length > limit:
            raise RefusedRequest(
                f"The prompt has {length} tokens, but PARA computes a prompt in one step, which has at most {limit} "
                f"tokens of a request ({option}): raise {option}, or shorten the prompt."
            )

    def _longest_prompt(self) -> tuple[int, str]:
        """Returns the maximum number of prompt tokens per request and step, and the option that sets it."""
        scheduler, spec = self.config.scheduler_config, self.config.speculative_config
        drafts = spec.max_num_new_slots_for_drafting if spec is not None else 0
        limits = [(scheduler.max_num_batched_tokens - drafts, "max_num_batched_tokens")]
        if scheduler.max_num_scheduled_tokens is not None:
            limits.append((scheduler.max_num_scheduled_tokens, "max_num_scheduled_tokens"))
        if scheduler.long_prefill_token_threshold > 0:
            limits.append((scheduler.long_prefill_token_threshold, "long_prefill_token_threshold"))
        return min(limits)


BEAM_SEARCH_REFUSAL = (
    "PARA adapters do not support beam search, because vLLM submits each beam as a new prompt, which would change the "
    "vectors: use n for several answers, or beam search without an adapter."
)
