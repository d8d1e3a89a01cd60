"""Forward hooks on the adapted model that set up the state of each call for the layers, and clear it afterwards.

They are on the model rather than the tuner, because PEFT calls the model directly if a config has no task type, and
because an injected model has no tuner. Two methods of the model are also wrapped, see `wrappers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..serving.call import Arguments, cache_in
from .blocks import ParaBlocks
from .cached_vectors import CachedVectors
from .calls import Calls, can_generate
from .state import Call
from .wrappers import CHECKPOINT_FUNCTION, PromptKeepingCheckpoint, PromptKeepingGenerate


class CallHooks:
    """The forward hooks of one adapted model.

    Only the outermost call is tracked: the backbone of a language model runs within the language model's call.

    Args:
        model: the adapted model.
        blocks: its adapted blocks.
    """

    def __init__(self, model: Any, blocks: ParaBlocks) -> None:
        self.model = model
        self.blocks = blocks
        self.calls = Calls(model, blocks)
        self.encoder = model.get_encoder() if self.calls.has_encoder_and_decoder else None
        self.handles: list[Any] = []

    @classmethod
    def of(cls, model: nn.Module, blocks: ParaBlocks) -> CallHooks:
        """Returns the hooks of a model, or new ones that are not installed yet."""
        installed = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
        return next((hooks for hooks in installed if isinstance(hooks, cls)), None) or cls(model, blocks)

    def install(self) -> None:
        """Adds the hooks to the model and to each pretrained model inside it that does not have them yet."""
        parts = [self.model, *(part for part in self.model.modules() if isinstance(part, PreTrainedModel))]
        for part in parts:
            if any(getattr(hook, "__self__", None) is self for hook in part._forward_pre_hooks.values()):
                continue
            self.handles.append(part.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(part.register_forward_hook(self.after, with_kwargs=True, always_call=True))
        if can_generate(self.model) and not isinstance(self.model.generate, PromptKeepingGenerate):
            self.model.generate = PromptKeepingGenerate(self.model, self.model.__dict__.get("generate"), self.blocks)

    def remove(self) -> None:
        """Removes the hooks, so that the model is as before `install`."""
        for handle in self.handles:
            handle.remove()
        for module in self.model.modules():
            checkpoint = module.__dict__.get(CHECKPOINT_FUNCTION)
            if isinstance(checkpoint, PromptKeepingCheckpoint):
                setattr(module, CHECKPOINT_FUNCTION, checkpoint.checkpoint)
        generate = self.model.__dict__.get("generate")
        if isinstance(generate, PromptKeepingGenerate):
            del self.model.generate
            if generate.wrapped is not None:
                self.model.generate = generate.wrapped
        self.handles = []

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Starts a call: finds its prompt, or the vectors on its cache.

        Raises:
            RuntimeError: the call comes from `torch.nn.DataParallel`.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "PARA does not support torch.nn.DataParallel, whose replicas share the state of a call. Start one "
                "process per device with accelerate launch or torchrun, or make a single device visible with "
                "CUDA_VISIBLE_DEVICES."
            )
        state = self.blocks.state
        if module is self.model:
            state.call = state.owner = None
        if state.call is not None:
            return None
        state.call = self.calls.open(Arguments.of(module, args, kwargs))
        state.owner = module
        if module.training:
            self._keep_prompts_in_checkpoints()
        if "prompt_mask" not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != "prompt_mask"}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Ends a call, including a failed one, and stores its vectors on the cache that it filled."""
        state = self.blocks.state
        call = state.call
        if call is None:
            return
        if module is self.encoder and state.owner is not module and output is not None:
            call.memory = output[0]
        if state.owner is not module:
            return
        state.call = state.owner = None
        if output is None or not call.adapters or call.segments is not None:
            return
        arguments = call.arguments
        cache = arguments.cache
        if call.from_cache:
            if (kept := CachedVectors.of(cache)) is not None:
                kept.go_on(cache)
            return
        cache = cache_in(output) if cache is None else cache
        if cache is not None and call.vectors:
            self._keep(call, cache, arguments.ids)

    @torch.compiler.disable
    def _keep(self, call: Call, cache: Any, ids: torch.Tensor | None) -> None:
        """Stores a call's vectors on the cache that it filled."""
        tokens, generation = call.tokens or 0, self.blocks.state.generation
        length = max((prompt.length(tokens) for prompt in call.prompts.values()), default=tokens)
        CachedVectors(
            model=self.blocks.identifier,
            adapters=call.adapters,
            rows=call.rows,
            vectors=call.vectors,
            batch=call.batch,
            prompt_length=length,
            prompt_ids=None if ids is None or self.calls.has_encoder_and_decoder else ids[:, :length].clone(),
            tokens=tokens,
            generation=None if generation is None else generation.identifier,
            continued=tokens > length,
        ).keep_on(cache, self.calls.has_encoder_and_decoder)

    def _keep_prompts_in_checkpoints(self) -> None:
        for module in self.model.modules():
            checkpoint = module.__dict__.get(CHECKPOINT_FUNCTION)
            if checkpoint is not None and not isinstance(checkpoint, PromptKeepingCheckpoint):
                setattr(module, CHECKPOINT_FUNCTION, PromptKeepingCheckpoint(checkpoint, self.blocks.state))
