"""Forward hooks that find the prompt of each call of the model and tell the layers.

Hooks on the adapted model find the prompt of each call and store its vectors on the cache that the call filled. They
sit on the model rather than on the tuner, because PEFT calls the model directly where a config has no task type, and
because an injected model has no tuner. Two methods of the model need a word more: what gradient checkpointing runs
again has to run under the call that it belongs to, and `generate` alone knows how long its prompt is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..serving.call import choices_as_rows, named_arguments, rows_and_tokens
from ..serving.continuous_batching import is_paged
from ..serving.tenants import adapted_modules, wrong_length
from .caches import CachedVectors, cache_in, holds_tokens, is_compiled_step, usable
from .inputs import inputs_of
from .prompt import Prompt, causal_prompt, whole_input
from .state import Call, ParaState
from .wrappers import (
    CHECKPOINT_FUNCTION,
    PromptKeepingCheckpoint,
    PromptKeepingGenerate,
    first_not_none,
)


class CallHooks:
    """The forward hooks of one adapted model.

    Only the outermost call counts: the backbone inside of a language model runs under the language model's call.

    Args:
        model: the adapted model.
        state: what its layers share.
    """

    def __init__(self, model: Any, state: ParaState) -> None:
        self.model = model
        self.state = state
        self.handles: list[Any] = []
        config = getattr(model, "config", None)
        self.has_encoder_and_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.is_causal = not self.has_encoder_and_decoder and _can_generate(model)
        self.encoder = model.get_encoder() if self.has_encoder_and_decoder else None

    def install(self) -> None:
        """Puts the hooks on the model and on each pretrained model inside of it that has none yet."""
        parts = [self.model, *(part for part in self.model.modules() if isinstance(part, PreTrainedModel))]
        for part in parts:
            if any(getattr(hook, "__self__", None) is self for hook in part._forward_pre_hooks.values()):
                continue
            self.handles.append(part.register_forward_pre_hook(self.before, with_kwargs=True))
            self.handles.append(part.register_forward_hook(self.after, with_kwargs=True, always_call=True))
        if _can_generate(self.model) and not isinstance(self.model.generate, PromptKeepingGenerate):
            self.model.generate = PromptKeepingGenerate(self.model, self.model.__dict__.get("generate"), self.state)

    def remove(self) -> None:
        """Leaves the model as it was before `install`."""
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
        """Opens a call: finds its prompt, or its vectors on the cache.

        Raises:
            RuntimeError: the call is one of `torch.nn.DataParallel`'s.
        """
        if getattr(module, "_is_replica", False):
            raise RuntimeError(
                "PARA does not run under torch.nn.DataParallel, whose replicas share what belongs to one call. Start one "
                "process for each device, with accelerate launch or torchrun, or show the program a single device with "
                "CUDA_VISIBLE_DEVICES."
            )
        current = self.state.current
        if module is self.model:
            current.call = current.owner = None
        if current.call is not None:
            return None
        current.call = self._open(module, named_arguments(module, args, kwargs))
        current.owner = module
        if module.training:
            self._keep_prompts_in_checkpoints()
        if "prompt_mask" not in kwargs:
            return None
        return args, {name: value for name, value in kwargs.items() if name != "prompt_mask"}

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Closes a call, also one that failed, and stores its vectors on the cache that it filled."""
        current = self.state.current
        call = current.call
        if call is None:
            return
        if module is self.encoder and current.owner is not module and output is not None:
            call.memory = output[0]
        if current.owner is not module:
            return
        current.call = current.owner = None
        if output is None or not call.adapters or call.segments is not None:
            return
        named = named_arguments(module, args, kwargs)
        cache = cache_in(named)
        if call.from_cache:
            if (kept := CachedVectors.of(cache)) is not None:
                kept.go_on(cache)
            return
        cache = cache_in(output) if cache is None else cache
        if cache is not None and call.vectors:
            self._keep(call, cache, named.get("input_ids"))

    @torch.compiler.disable
    def _keep(self, call: Call, cache: Any, ids: torch.Tensor | None) -> None:
        """Stores a call's vectors on the cache that it filled."""
        tokens, generation = call.tokens or 0, self.state.current.generation
        length = max((prompt.length(tokens) for prompt in call.prompts.values()), default=tokens)
        CachedVectors(
            model=self.state.identifier,
            adapters=call.adapters,
            rows=call.rows,
            vectors=call.vectors,
            batch=call.batch,
            prompt_length=length,
            prompt_ids=None if ids is None or self.has_encoder_and_decoder else ids[:, :length].clone(),
            tokens=tokens,
            generation=None if generation is None else generation.identifier,
            continued=tokens > length,
        ).keep_on(cache, self.has_encoder_and_decoder)

    def _open(self, module: nn.Module, named: dict[str, Any]) -> Call:
        rows = self.state.current.rows
        adapters = self.state.active_adapters()
        cache = cache_in(named)
        kept = None if cache is None else CachedVectors.of(cache)
        if not adapters or self.state.current.measuring:
            if kept is not None:
                kept.lost = True  # tokens of the base model follow
            return Call()
        named, choices = choices_as_rows(module, named)
        prompt_mask = named.get("prompt_mask")
        if rows is not None:
            adapters = tuple(dict.fromkeys(rows))
            if len(rows) * choices == _token_shape(named)[0]:
                rows = tuple(name for name in rows for _ in range(choices))
        if is_paged(named):
            return self.state.current_step().open(named["input_ids"], adapters, self.state)
        if cache is not None and self._is_filled(cache, kept, _token_shape(named)[1]):
            return self._read(named, cache, kept, adapters, rows, prompt_mask)
        return self._fill(module, named, adapters, rows, prompt_mask)

    def _is_filled(self, cache: Any, kept: CachedVectors | None, tokens: int | None) -> bool:
        """Whether a call of so many tokens a row goes on from what a cache holds."""
        if kept is None:
            return holds_tokens(cache)
        length: Any = None if self.has_encoder_and_decoder else kept.length(cache)
        if is_compiled_step(length, tokens):
            torch._assert_async(
                length >= kept.prompt_length,
                "The static cache no longer holds the prompt that its PARA vectors were made from: pass a new cache.",
            )
            return True
        if kept.lost or (length is not None and length == 0):
            return holds_tokens(cache)
        return True

    def _read(
        self,
        named: dict[str, Any],
        cache: Any,
        kept: CachedVectors | None,
        adapters: tuple[str, ...],
        rows: tuple[str, ...] | None,
        prompt_mask: torch.Tensor | None,
    ) -> Call:
        """Opens a call that goes on from a filled cache.

        Raises:
            ValueError: the cache does not hold the vectors that this call needs.
        """
        kept = usable(kept, self.state.identifier)
        batch, tokens = _token_shape(named)
        self._find_rows(named, None, batch, tokens)
        expected = kept.rows if rows is None else self._rows_for(rows, batch)
        kept.check_call(batch, expected, adapters)
        length = kept.length(cache)
        if not (self.has_encoder_and_decoder or is_compiled_step(length, tokens)):
            ids = named.get("input_ids")
            cached = kept.prompt_length + kept.continued if length is None else int(length)
            again = kept.prompt_tokens_again(cached, ids)
            if not again or again != tokens:
                rest = (value[:, again:] if again and value is not None else value for value in (ids, prompt_mask))
                ids, mask = rest
                brought = None if tokens is None else tokens - again
                self._refuse_longer_prompt(kept, cached + again, brought, ids, mask)
        return Call(adapters, expected, batch=batch, tokens=tokens, vectors=kept.vectors, from_cache=True)

    def _refuse_longer_prompt(
        self,
        kept: CachedVectors,
        cached: int,
        tokens: int | None,
        input_ids: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
    ) -> None:
        """Raises where a call brings more of a prompt whose vectors are already made.

        A single token after a prompt is in doubt where it is the last of the prompt of another `generate`. What begins
        with the token that `generate` gave is a further turn. Within the `generate` of the prompt, or of a model that
        drafts for another, several accepted tokens come back at once.
        """
        generation, brought = self.state.current.generation, tokens or 1
        same_prompt, completes = False, False
        if generation is not None:
            length = generation.length
            same_prompt = generation.drafts or generation.identifier == kept.generation
            same_prompt = same_prompt or (length is not None and length <= kept.tokens)
            completes = length == cached + brought
        in_doubt = not same_prompt and (brought > 1 or completes)
        if prompt_mask is None and in_doubt and generation is not None:
            prompt_mask = generation.marked_from(kept.prompt_length)
        if prompt_mask is not None:
            longer = bool(prompt_mask.any())
        elif cached == kept.prompt_length:
            longer = in_doubt and not kept.goes_on_with(input_ids)
        else:
            longer = cached < kept.prompt_length and not same_prompt
        if longer:
            raise ValueError(
                f"The cache holds {cached} tokens and the vectors of a prompt of {kept.prompt_length}, and this call "
                f"brings {tokens} more tokens: were they prompt too, the vectors would have to be made from all of "
                "it. Pass the whole prompt in one call (no prefill_chunk_size, no prefix from another prompt). If the "
                "tokens go on from the prompt, say so with prompt_mask=torch.zeros_like(input_ids, dtype=torch.bool), "
                "which the model and `generate` take."
            )

    @torch.compiler.disable  # where a prompt ends depends on the data, which no graph can follow
    def _fill(
        self,
        module: nn.Module,
        named: dict[str, Any],
        adapters: tuple[str, ...],
        rows: tuple[str, ...] | None,
        prompt_mask: torch.Tensor | None,
    ) -> Call:
        """Opens a call that makes the vectors of its prompt."""
        batch, tokens = _token_shape(named)
        ends = self.state.prompt_ends(adapters)
        prompts: dict[tuple[int, ...] | None, Prompt]
        memory = first_not_none(named.get("encoder_hidden_states"), named.get("encoder_outputs"))
        if memory is not None and not isinstance(memory, torch.Tensor):
            memory = memory[0]
        if memory is not None and self.has_encoder_and_decoder:
            batch, tokens = memory.shape[:2]
        self._find_rows(named, rows, batch, tokens)
        if batch is None or tokens is None:
            prompts = dict.fromkeys(ends, Prompt(None))
        else:
            generation = self.state.current.generation
            inputs = inputs_of(module, named, (batch, tokens), memory, prompt_mask, generation, self.is_causal)
            if self.is_causal:
                prompts = {end: causal_prompt(inputs, end, module.training) for end in ends}
            else:
                prompts = dict.fromkeys(ends, whole_input(inputs))
        segments = next((prompt.segments for prompt in prompts.values()), None)
        if segments is not None and self.has_encoder_and_decoder:
            raise ValueError(
                "The call packs several sequences into a row, but PARA cannot tell which tokens of the decoder belong to "
                "which of them: give each sequence a row of its own, or leave out what says where each begins."
            )
        if rows is not None:
            if batch is None and module is not self.model and self.model.main_input_name not in named:
                return Call(adapters, has_no_rows=True)
            rows = self._rows_for(rows, rows_and_tokens(self.model, named)[0] if batch is None else batch)
        return Call(adapters, rows, prompts, batch, tokens=tokens, segments=segments, memory=memory)

    def _find_rows(
        self, named: dict[str, Any], rows: tuple[str, ...] | None, batch: int | None, tokens: int | None
    ) -> None:
        """Finds out where the layers see the rows, where the shapes of a call may leave that open."""
        found, tokens_of_decoder = rows_and_tokens(self.model, named)
        # How many tokens images and sounds become is not known before.
        is_open = rows or batch in (None, tokens, tokens_of_decoder)
        if not is_open or (found if batch is None else batch) in (None, 0, 1):
            return
        current = self.state.current
        current.measuring = True
        try:
            self.state.places.measure(self.model, list(adapted_modules(self.model)), named)
        finally:
            current.measuring = False

    def _rows_for(self, rows: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
        """Returns the adapter of each row of a call; within `generate` each row may have been repeated.

        Raises:
            ValueError: the names are not one for each row.
        """
        if batch is None or batch == len(rows):
            return rows
        generation = self.state.current.generation
        if generation is None or batch != len(rows) * generation.expansion:
            raise wrong_length(rows, batch)
        return tuple(name for name in rows for _ in range(generation.expansion))

    def _keep_prompts_in_checkpoints(self) -> None:
        for module in self.model.modules():
            checkpoint = module.__dict__.get(CHECKPOINT_FUNCTION)
            if checkpoint is not None and not isinstance(checkpoint, PromptKeepingCheckpoint):
                setattr(module, CHECKPOINT_FUNCTION, PromptKeepingCheckpoint(checkpoint, self.state))


def _can_generate(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate())


def _token_shape(named: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns a call's (rows, tokens); None for what its arguments do not say."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(value := named.get(name), torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    for name in ("decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(value := named.get(name), torch.Tensor) and value.dim() >= 2:
            return value.shape[0], None
    return None, None
