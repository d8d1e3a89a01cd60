"""Tells the layers which call of the model is running, whoever makes it.

Hooks on the adapted model find the prompt of each call and store its vectors on the cache that the call filled. They
sit on the model rather than on the tuner, because PEFT calls the model directly where a config has no task type, and
because an injected model has no tuner. Two methods of the model need a word more: what gradient checkpointing runs
again has to run under the call that it belongs to, and `generate` alone knows how long its prompt is.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..serving.continuous_batching import FIX, is_paged
from ..tenants import adapted_modules
from .prompt import Inputs, Prompt, attended_tokens, causal_prompt, whole_input
from .state import CachedVectors, Generation, ParaState, PromptPass
from .wrappers import (
    CHECKPOINT_FUNCTION,
    PromptKeepingCheckpoint,
    PromptKeepingGenerate,
    first_not_none,
)


_ENCODER_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")


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
        self.watched: list[nn.Module] = []
        self.handles: list[Any] = []
        self.argument_names: dict[type, list[str]] = {}
        config = getattr(model, "config", None)
        self.has_encoder_and_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.is_causal = not self.has_encoder_and_decoder and _can_generate(model)
        self.encoder = model.get_encoder() if self.has_encoder_and_decoder else None

    def install(self) -> None:
        """Puts the hooks on the model and on each pretrained model inside of it that has none yet."""
        parts = [self.model, *(part for part in self.model.modules() if isinstance(part, PreTrainedModel))]
        for part in parts:
            if any(part is watched for watched in self.watched):
                continue
            self.watched.append(part)
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
        self.handles, self.watched = [], []

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
        prompt_mask = kwargs.get("prompt_mask")
        current.call = self._open(module, self._named(module, args, kwargs), prompt_mask)
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
        if output is None or call.from_cache or not call.adapters or call.segments is not None:
            return
        cache = _cache_in(self._named(module, args, kwargs)) or _cache_in(output)
        if cache is not None and call.vectors:
            self._keep(call, cache)

    @torch.compiler.disable
    def _keep(self, call: PromptPass, cache: Any) -> None:
        """Stores a call's vectors on the cache that it filled."""
        tokens = call.tokens or 0
        CachedVectors(
            model=self.state.identifier,
            adapters=call.adapters,
            rows=call.rows,
            vectors=call.vectors,
            batch=call.batch,
            prompt_length=max((prompt.length(tokens) for prompt in call.prompts.values()), default=tokens),
        ).keep_on(cache)

    def _named(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call by name."""
        if not args:
            return kwargs
        kind = type(module)
        if kind not in self.argument_names:
            self.argument_names[kind] = list(inspect.signature(module.forward).parameters)
        return {**dict(zip(self.argument_names[kind], args, strict=False)), **kwargs}

    def _open(self, module: nn.Module, named: dict[str, Any], prompt_mask: torch.Tensor | None) -> PromptPass:
        rows = self.state.current.rows
        adapters = self.state.active_adapters()
        if not adapters or self.state.current.measuring:
            return PromptPass()
        if rows is not None:
            adapters = tuple(dict.fromkeys(rows))
        if is_paged(named):
            step = self.state.current.step
            if step is None:
                raise ValueError(
                    "This continuous batching does not tell PARA which request each token belongs to: take the manager "
                    f"that the adapted model's own init_continuous_batching returns, or {FIX}."
                )
            return step.open(named["input_ids"], adapters, self.state)
        cache = _cache_in(named)
        if cache is not None and self._is_filled(cache, _token_shape(named)[1]):
            return self._read(named, cache, adapters, rows, prompt_mask)
        return self._fill(module, named, adapters, rows, prompt_mask)

    def _is_filled(self, cache: Any, tokens: int | None) -> bool:
        """Says whether a call of so many tokens a row goes on from what a cache holds."""
        kept = CachedVectors.of(cache)
        if kept is None or not _is_compiled_step(cache, tokens):
            return int(cache.get_seq_length()) > 0
        torch._assert_async(
            cache.get_seq_length() >= (1 if self.has_encoder_and_decoder else kept.prompt_length),
            "The static cache no longer holds the prompt that its PARA vectors were made from: pass a new cache.",
        )
        return True

    def _read(
        self,
        named: dict[str, Any],
        cache: Any,
        adapters: tuple[str, ...],
        rows: tuple[str, ...] | None,
        prompt_mask: torch.Tensor | None,
    ) -> PromptPass:
        """Opens a call that goes on from a filled cache.

        Raises:
            ValueError: the cache does not hold the vectors that this call needs.
        """
        kept = CachedVectors.of(cache)
        if kept is None or kept.model != self.state.identifier:
            raise ValueError(
                "The cache was not filled by a call of this model with its PARA adapter active, so that it holds no "
                "vectors of a prompt: a prefix that another model, or the base model, computed cannot be reused. "
                "Start from an empty cache, with the adapter active."
            )
        batch, tokens = _token_shape(named)
        vectors = kept.vectors_for(batch)
        expected = kept.rows if rows is None else self._rows_for(rows, batch)
        if kept.rows != expected or (kept.rows is None and set(kept.adapters) != set(adapters)):
            raise ValueError(
                f"The cache was filled with the adapters {list(kept.rows or kept.adapters)}, but "
                f"{list(expected or adapters)} are active now: a prompt's vectors serve the adapter that made them. "
                "Start from an empty cache after switching adapters."
            )
        if not (self.has_encoder_and_decoder or _is_compiled_step(cache, tokens)):
            self._refuse_longer_prompt(kept, int(cache.get_seq_length()), tokens, prompt_mask)
        return PromptPass(adapters, expected, batch=batch, tokens=tokens, vectors=vectors, from_cache=True)

    def _refuse_longer_prompt(
        self, kept: CachedVectors, cached: int, tokens: int | None, prompt_mask: torch.Tensor | None
    ) -> None:
        """Raises where a call brings more of a prompt whose vectors are already made.

        The first token after a prompt is never in doubt, and neither is a call within the `generate` of that prompt,
        or of a model that drafts for another: there several accepted tokens come back at once.
        """
        generation = self.state.current.generation or Generation()
        beyond_prompt = cached > kept.prompt_length or (cached == kept.prompt_length and (tokens or 1) < 2)
        within_prompt = generation.length is not None and generation.length <= kept.prompt_length
        if prompt_mask is None:
            longer = not (beyond_prompt or within_prompt or generation.drafts)
        else:
            longer = bool(prompt_mask.any())
        if longer:
            raise ValueError(
                f"The cache holds {cached} tokens and the vectors of a prompt of {kept.prompt_length}, and this call "
                f"brings {tokens} more tokens: were they prompt too, the vectors would have to be made from all of "
                "it. Pass the whole prompt in one call (no prefill_chunk_size, no prefix from another prompt). If the "
                "tokens go on from the prompt, say so with prompt_mask=torch.zeros(batch, tokens, dtype=torch.bool)."
            )

    @torch.compiler.disable  # where a prompt ends depends on the data, which no graph can follow
    def _fill(
        self,
        module: nn.Module,
        named: dict[str, Any],
        adapters: tuple[str, ...],
        rows: tuple[str, ...] | None,
        prompt_mask: torch.Tensor | None,
    ) -> PromptPass:
        """Opens a call that makes the vectors of its prompt."""
        batch, tokens = _token_shape(named)
        ends = self.state.prompt_ends(adapters)
        prompts: dict[tuple[int, ...] | None, Prompt]
        memory = first_not_none(named.get("encoder_hidden_states"), named.get("encoder_outputs"))
        if memory is not None and not isinstance(memory, torch.Tensor):
            memory = memory[0]
        if memory is not None and self.has_encoder_and_decoder:
            batch, tokens = memory.shape[:2]
        if batch is not None and batch > 1 and (rows is not None or batch in (tokens, _token_shape(named)[1])):
            self._find_rows(named)
        if batch is None or tokens is None:
            prompts = dict.fromkeys(ends, Prompt(None))
        else:
            inputs = self._inputs(named, batch, tokens, memory, prompt_mask)
            if self.is_causal:
                prompts = {end: causal_prompt(inputs, end, module.training) for end in ends}
            else:
                prompts = dict.fromkeys(ends, whole_input(inputs))
        segments = next((prompt.segments for prompt in prompts.values()), None)
        rows = None if rows is None else self._rows_for(rows, _num_rows(named) if batch is None else batch)
        return PromptPass(adapters, rows, prompts, batch, tokens=tokens, segments=segments, memory=memory)

    def _find_rows(self, named: dict[str, Any]) -> None:
        """Finds out where the layers see the rows, where the shape of their inputs may leave that open."""
        current = self.state.current
        current.measuring = True
        try:
            self.state.places.measure(self.model, list(adapted_modules(self.model)), named)
        finally:
            current.measuring = False

    def _inputs(
        self,
        named: dict[str, Any],
        batch: int,
        tokens: int,
        memory: torch.Tensor | None,
        prompt_mask: torch.Tensor | None,
    ) -> Inputs:
        ids = named.get("input_ids")
        first = first_not_none(memory, *(named.get(name) for name in _ENCODER_INPUTS))
        device = first.device
        mask = named.get("encoder_attention_mask")
        mask = named.get("attention_mask") if mask is None else mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != tokens and not self.is_causal:
            # A mask over samples of sound or pixels says nothing about the encoder's tokens.
            mask = None
        generation = self.state.current.generation
        if generation is not None and not generation.owns(ids):
            generation = None
        if prompt_mask is None and generation is not None and generation.prompt_mask is not None:
            prompt_mask = _fit(generation.prompt_mask, batch, tokens)
        if prompt_mask is not None and tuple(prompt_mask.shape) != (batch, tokens):
            raise ValueError(
                f"prompt_mask has the shape {tuple(prompt_mask.shape)}, but the call has {batch} rows of {tokens} "
                "tokens: pass one bool for each token, True where it belongs to the prompt."
            )
        return Inputs(
            attended=attended_tokens(mask, batch, tokens, device),
            input_ids=ids if memory is None else None,
            position_ids=named.get("position_ids"),
            labels=named.get("labels"),
            prompt_mask=None if prompt_mask is None else prompt_mask.to(device).bool(),
            generated_from=None if generation is None else generation.length,
        )

    def _rows_for(self, rows: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
        """Returns the adapter of each row of a call; within `generate` each row may have been repeated.

        Raises:
            ValueError: the names are not one for each row.
        """
        if batch is None or batch == len(rows):
            return rows
        if self.state.current.generation is None or not rows or batch % len(rows):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(rows)} and {batch} respectively: pass one name for each row, "
                "'__base__' for those without an adapter."
            )
        return tuple(name for name in rows for _ in range(batch // len(rows)))

    def _keep_prompts_in_checkpoints(self) -> None:
        for module in self.model.modules():
            checkpoint = module.__dict__.get(CHECKPOINT_FUNCTION)
            if checkpoint is not None and not isinstance(checkpoint, PromptKeepingCheckpoint):
                setattr(module, CHECKPOINT_FUNCTION, PromptKeepingCheckpoint(checkpoint, self.state))


def _can_generate(model: Any) -> bool:
    can_generate = getattr(model, "can_generate", None)
    return bool(can_generate is not None and can_generate())


def _cache_in(values: Any) -> Any:
    """Returns the KV cache among a call's arguments, or in its output."""
    if isinstance(values, tuple):
        return next((value for value in values if hasattr(value, "get_seq_length")), None)
    cache = values.get("past_key_values") if isinstance(values, dict) else getattr(values, "past_key_values", None)
    return cache if hasattr(cache, "get_seq_length") else None


def _num_rows(named: dict[str, Any]) -> int | None:
    """Returns the rows of a call that has no tokens: those of its first tensor."""
    return next((len(value) for value in named.values() if isinstance(value, torch.Tensor) and value.dim()), None)


def _is_compiled_step(cache: Any, tokens: int | None) -> bool:
    """Says whether torch.compile traces a call of one token a row, with a static cache.

    Such a cache keeps its length in a tensor. To read it would break the graph at each step, and there is nothing to
    find out: one token after a prompt is never in doubt.
    """
    return torch.compiler.is_compiling() and tokens == 1 and isinstance(cache.get_seq_length(), torch.Tensor)


def _token_shape(named: dict[str, Any]) -> tuple[int | None, int | None]:
    """Returns a call's (rows, tokens); None for what its arguments do not say."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(value := named.get(name), torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    for name in ("decoder_input_ids", "decoder_inputs_embeds"):
        if isinstance(value := named.get(name), torch.Tensor) and value.dim() >= 2:
            return value.shape[0], None
    return None, None


def _fit(prompt_mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """Returns the prompt mask of a generation for a call whose rows are repeated and whose tokens go on."""
    if batch % prompt_mask.shape[0] or tokens < prompt_mask.shape[1]:
        return prompt_mask
    mask = prompt_mask.repeat_interleave(batch // prompt_mask.shape[0], 0)
    return torch.cat((mask, mask.new_zeros(batch, tokens - mask.shape[1])), 1)
