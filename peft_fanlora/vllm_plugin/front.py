"""What is refused before it reaches the engine, so that a bad request or folder harms no other."""

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
    """A request that PARA cannot serve; vLLM's server answers it with HTTP 400."""


class Front:
    """Checks the requests and folders of one engine.

    Args:
        vllm_config: its configuration.
        options: what it was asked to do for PARA.
    """

    def __init__(self, vllm_config: Any, options: Options) -> None:
        self.config = vllm_config
        self.options = options
        self.checked = lru_cache(maxsize=4096)(self._check)
        self._shapes: dict[str, tuple[int, int]] | None = None

    def check_adapter(self, request: Any) -> bool:
        """Returns whether a `LoRARequest` names a PARA adapter.

        Raises:
            RefusedRequest: its folder cannot be served by this engine.
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
            way = "export it with export_lora" if method == "FANLORA" else "vLLM serves LoRA, and this plugin PARA"
            raise TenantError(f"{folder!r} is of the method {method!r}: {way}.")
        if not self.options.lora:
            raise TenantError(
                f"{folder!r} is a LoRA adapter, and this engine serves PARA alone: start it with "
                'additional_config={"para": {"lora": true}}.'
            )
        if state[1] is None:
            raise TenantError(f"{folder!r} has no weights in safetensors: save the adapter again.")
        PEFTHelper.from_local_dir(folder, None).validate_legal(self.config.lora_config)
        return False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """The linear layers of the served model as transformers builds it, where adapters are trained."""
        if self._shapes is None:
            config = copy.deepcopy(self.config.model_config.hf_config)
            architecture = next(iter(getattr(config, "architectures", None) or ()), "")
            model_class: Any = getattr(transformers, architecture, None)
            if model_class is None:
                raise TenantError(
                    f"transformers has no {architecture!r}, so that no adapter can be compared with the served model."
                )
            # Where the engine runs in this process on vLLM's Transformers backend, it has changed these classes.
            with set_current_vllm_config(self.config), torch.device("meta"):
                self._shapes = linear_shapes(model_class(config))
        return self._shapes

    def check_request(self, request: Any) -> None:
        """Checks a request of a PARA adapter as vLLM has prepared it for the engine.

        Raises:
            RefusedRequest: it asks for something that PARA cannot do.
        """
        if request.pooling_params is not None:
            raise RefusedRequest("PARA adapters generate; a pooling request goes to the base model.")
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise RefusedRequest(
                "A PARA adapter needs the prompt's tokens, and prompt_embeds has none: pass text or tokens."
            )
        if request.mm_features:
            raise RefusedRequest("PARA adapters are served for text alone: send images and sounds to the base model.")
        if request.resumable:
            raise RefusedRequest(
                "The prompt of a PARA adapter must be complete, and this request streams its input: send it in one piece."
            )
        length, limit, option = len(request.prompt_token_ids), *self._longest_prompt()
        if length > limit:
            raise RefusedRequest(
                f"The prompt has {length} tokens, and PARA computes a prompt in one step, which may hold {limit} "
                f"({option}): raise {option}, or shorten the prompt."
            )

    def _longest_prompt(self) -> tuple[int, str]:
        """Returns how many prompt tokens one step may compute of a request, and the option that says so."""
        scheduler, spec = self.config.scheduler_config, self.config.speculative_config
        drafts = spec.max_num_new_slots_for_drafting if spec is not None else 0
        limits = [(scheduler.max_num_batched_tokens - drafts, "max_num_batched_tokens")]
        if scheduler.max_num_scheduled_tokens is not None:
            limits.append((scheduler.max_num_scheduled_tokens, "max_num_scheduled_tokens"))
        if scheduler.long_prefill_token_threshold > 0:
            limits.append((scheduler.long_prefill_token_threshold, "long_prefill_token_threshold"))
        return min(limits)


BEAM_SEARCH_REFUSAL = (
    "vLLM's beam search passes each beam as a new prompt, from which a PARA adapter would make other vectors: use n for "
    "several answers, or beam search without an adapter."
)
