"""Prepares each call of the model: finds its prompt, or the vectors stored on its cache."""

from __future__ import annotations

from typing import Any

import torch

from ..serving.call import Arguments
from ..serving.continuous_batching import FIX
from ..serving.tenants import adapted_modules, wrong_length
from .blocks import ParaBlocks
from .cached_vectors import CachedVectors, usable
from .caches import holds_tokens
from .inputs import inputs_of
from .prompt import Prompt, causal_prompt, whole_input
from .state import Call, PromptEnd


class Calls:
    """Creates the `Call` for each call of an adapted model.

    Args:
        model: the adapted model.
        blocks: its adapted blocks.
    """

    def __init__(self, model: Any, blocks: ParaBlocks) -> None:
        self.model = model
        self.blocks = blocks
        self.state = blocks.state
        config = getattr(model, "config", None)
        self.has_encoder_and_decoder = bool(getattr(config, "is_encoder_decoder", False))
        self.is_causal = not self.has_encoder_and_decoder and can_generate(model)

    def open(self, arguments: Arguments) -> Call:
        """Returns the `Call` for these arguments of the model or of one of its parts.

        Raises:
            ValueError: the end of the prompt is unknown, or the cache does not hold the prompt's vectors.
        """
        rows, cache = self.state.rows, arguments.cache
        adapters = self.blocks.active_adapters()
        kept = None if cache is None else CachedVectors.of(cache)
        if not adapters or self.state.measuring:
            if kept is not None:
                kept.lost = True  # the base model will write its own tokens
            return Call(arguments)
        if rows is not None:
            adapters = tuple(dict.fromkeys(rows))
            if len(rows) * arguments.choices == arguments.text_shape[0]:
                rows = tuple(name for name in rows for _ in range(arguments.choices))
        if arguments.is_paged:
            return self._open_step(arguments, adapters)
        if cache is not None and self._is_filled(cache, kept, arguments.text_shape[1]):
            return self._read(arguments, kept, adapters, rows)
        return self._fill(arguments, adapters, rows)

    def _open_step(self, arguments: Arguments, adapters: tuple[str, ...]) -> Call:
        if self.state.step is None:
            raise ValueError(
                "This continuous batching does not tell PARA which request each token belongs to: use the manager "
                f"returned by the adapted model's own init_continuous_batching, or {FIX}."
            )
        return self.state.step.open(arguments, adapters, self.blocks.prompt_ends, self.state.step_before)

    def _is_filled(self, cache: Any, kept: CachedVectors | None, tokens: int | None) -> bool:
        """Returns whether a call with this many tokens per row continues the content of a cache."""
        if kept is None:
            return holds_tokens(cache)
        length: Any = None if self.has_encoder_and_decoder else kept.length(cache)
        if _is_compiled_step(length, tokens):
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
        arguments: Arguments,
        kept: CachedVectors | None,
        adapters: tuple[str, ...],
        rows: tuple[str, ...] | None,
    ) -> Call:
        """Returns the `Call` that continues a filled cache.

        Raises:
            ValueError: the cache does not hold the vectors that this call needs.
        """
        kept = usable(kept, self.blocks.identifier)
        batch, tokens = arguments.text_shape
        self._find_rows(arguments, None, batch, tokens)
        expected = kept.rows if rows is None else self._rows_for(rows, batch)
        kept.check_call(batch, expected, adapters)
        length = kept.length(arguments.cache)
        if not (self.has_encoder_and_decoder or _is_compiled_step(length, tokens)):
            self._refuse_longer_prompt(arguments, kept, length)
        return Call(arguments, adapters, expected, batch=batch, tokens=tokens, vectors=kept.vectors, from_cache=True)

    def _refuse_longer_prompt(self, arguments: Arguments, kept: CachedVectors, length: int | None) -> None:
        """Raises if a call adds tokens to a prompt whose vectors are already made.

        A single token after the prompt is ambiguous only if it is the last prompt token of another `generate`. Tokens
        that begin with the one that `generate` returned are a further turn. Within the `generate` of the prompt, or of
        an assistant model, several accepted tokens may arrive at once.
        """
        ids, prompt_mask, tokens = arguments.ids, arguments.named.get("prompt_mask"), arguments.text_shape[1]
        cached = kept.prompt_length + kept.continued if length is None else int(length)
        again = kept.prompt_tokens_again(cached, ids)
        if again and again == tokens:
            return
        if again:
            ids, prompt_mask = (None if value is None else value[:, again:] for value in (ids, prompt_mask))
            cached, tokens = cached + again, None if tokens is None else tokens - again
        generation, brought = self.state.generation, tokens or 1
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
            longer = in_doubt and not kept.goes_on_with(ids)
        else:
            longer = cached < kept.prompt_length and not same_prompt
        if longer:
            raise ValueError(
                f"The cache holds {cached} tokens and the vectors of a prompt of {kept.prompt_length}, and this call "
                f"adds {tokens} tokens. If they belong to the prompt, its vectors must be made from all of it: pass "
                "the whole prompt in one call (no prefill_chunk_size, no prefix from another prompt). If they follow "
                "it, pass prompt_mask=torch.zeros_like(input_ids, dtype=torch.bool) to the model or to `generate`."
            )

    @torch.compiler.disable  # the end of the prompt depends on the data, so it cannot be part of a graph
    def _fill(self, arguments: Arguments, adapters: tuple[str, ...], rows: tuple[str, ...] | None) -> Call:
        """Returns the `Call` that makes the vectors of its prompt."""
        module, memory = arguments.model, arguments.memory
        shape = arguments.text_shape
        if memory is not None and self.has_encoder_and_decoder:
            shape = memory.shape[0], memory.shape[1]
        batch, tokens = shape
        self._find_rows(arguments, rows, batch, tokens)
        ends = self.blocks.prompt_ends(adapters)
        prompts: dict[PromptEnd, Prompt]
        if batch is None or tokens is None:
            prompts = dict.fromkeys(ends, Prompt(None))
        else:
            inputs = inputs_of(arguments, (batch, tokens), self.state.generation, self.is_causal)
            if self.is_causal:
                prompts = {end: causal_prompt(inputs, end, module.training) for end in ends}
            else:
                prompts = dict.fromkeys(ends, whole_input(inputs))
        segments = next((prompt.segments for prompt in prompts.values()), None)
        if segments is not None and self.has_encoder_and_decoder:
            raise ValueError(
                "The call packs several sequences into a row, and PARA cannot tell which decoder tokens belong to "
                "which: pass each sequence as a row of its own, or drop the arguments that mark packed sequences."
            )
        if rows is not None:
            if batch is None and module is not self.model and self.model.main_input_name not in arguments.named:
                return Call(arguments, adapters, has_no_rows=True)
            rows = self._rows_for(rows, arguments.rows if batch is None else batch)
        return Call(arguments, adapters, rows, prompts, batch, tokens, segments=segments, memory=memory)

    def _find_rows(
        self, arguments: Arguments, rows: tuple[str, ...] | None, batch: int | None, tokens: int | None
    ) -> None:
        """Determines the dimension of the rows in each layer's input if the shapes of a call are ambiguous."""
        # The number of tokens that an image or a sound becomes is not known in advance.
        is_open = rows or batch in (None, tokens, arguments.tokens)
        if not is_open or (arguments.rows if batch is None else batch) in (None, 0, 1):
            return
        self.state.measuring = True
        try:
            self.blocks.places.measure(self.model, list(adapted_modules(self.model)), arguments.named)
        finally:
            self.state.measuring = False

    def _rows_for(self, rows: tuple[str, ...], batch: int | None) -> tuple[str, ...]:
        """Returns the adapter of each row of a call. Within `generate` each row may have been repeated.

        Raises:
            ValueError: the number of names does not match the number of rows.
        """
        if batch is None or batch == len(rows):
            return rows
        generation = self.state.generation
        if generation is None or batch != len(rows) * generation.expansion:
            raise wrong_length(rows, batch)
        return tuple(name for name in rows for _ in range(generation.expansion))


def can_generate(model: Any) -> bool:
    """Returns whether transformers considers a model able to `generate`."""
    asks = getattr(model, "can_generate", None)
    return bool(asks is not None and asks())


def _is_compiled_step(length: Any, tokens: int | None) -> bool:
    """Returns whether torch.compile is tracing a call of one token per row with a static cache.

    Such a cache keeps its length in a tensor. Reading it would break the graph at each step, and is not needed: a
    single token after a prompt is never ambiguous.
    """
    return torch.compiler.is_compiling() and tokens == 1 and isinstance(length, torch.Tensor)
