"""Wrappers around two methods of a model that need information beyond the model's own calls.

Gradient checkpointing must run a block again with the state of its original call, and only `generate` knows the length
of its prompt. Both wrappers are set on the model instance, and removed when the adapters are unloaded.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..serving.call import Arguments, cache_in, first_not_none
from .blocks import ParaBlocks
from .cached_vectors import CachedVectors
from .state import Generation, ParaState, Text


CHECKPOINT_FUNCTION = "_gradient_checkpointing_func"
"""The attribute in which transformers stores a module's checkpoint function."""


class PromptKeepingCheckpoint:
    """A module's checkpoint function that runs a block both times with the state of its call.

    Args:
        checkpoint: the function that transformers set on the module.
        state: the state of the current thread.
    """

    def __init__(self, checkpoint: Callable[..., Any], state: ParaState) -> None:
        self.checkpoint = checkpoint
        self.state = state

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self.state.call
        if call is None:
            return self.checkpoint(function, *args, **kwargs)
        reentrant = getattr(self.checkpoint, "keywords", {}).get("use_reentrant")
        if reentrant and call.memory is not None and call.memory.requires_grad:
            raise ValueError(
                "Reentrant checkpointing would lose the encoder gradients that flow through the decoder's vectors: "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )

        def under_this_call(*block_args: Any, **block_kwargs: Any) -> Any:
            with self.state.using(call.without_vectors()):
                return function(*block_args, **block_kwargs)

        return self.checkpoint(under_this_call, *args, **kwargs)


class PromptKeepingGenerate:
    """A model's `generate` that records the length of the prompt for the model's calls, and accepts a `prompt_mask`.

    Without it, calls with draft tokens or without a cache could not separate the prompt from generated tokens.

    Args:
        model: the model.
        wrapped: the `generate` of this instance, if it differs from that of its class.
        blocks: the model's adapted blocks.
    """

    def __init__(self, model: Any, wrapped: Callable[..., Any] | None, blocks: ParaBlocks) -> None:
        self.model = model
        self.wrapped = wrapped
        self.blocks = blocks

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(type(self.model).generate)
        return own.replace(parameters=list(own.parameters.values())[1:])

    def __call__(self, *args: Any, prompt_mask: torch.Tensor | None = None, **kwargs: Any) -> Any:
        generate = self.wrapped or type(self.model).generate.__get__(self.model)
        if not self.blocks.active_adapters():
            return generate(*args, **kwargs)
        config = (args[1] if len(args) > 1 else kwargs.get("generation_config")) or self.model.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(config, "prefill_chunk_size", None))
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} splits the prompt, but PARA computes its vectors from the whole prompt "
                "in one pass: remove prefill_chunk_size."
            )
        if prompt_mask is not None and kwargs.get("cache_implementation") == "paged":
            kwargs["prompt_mask"] = prompt_mask  # continuous batching will refuse it
        generation = self._generation(args, kwargs, prompt_mask)
        if getattr(config, "is_assistant", False):
            generation.drafts = True
        generation.expansion = Arguments(self.model, {"generation_config": config, **kwargs}).expansion
        with self.blocks.state.generating(generation):
            output = generate(*args, **kwargs)
        self._remember_answer(generation, first_not_none(cache_in(kwargs), cache_in(output)), output)
        return output

    def _generation(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], prompt_mask: torch.Tensor | None
    ) -> Generation:
        """Returns the information about the prompt from the arguments of `generate`.

        Raises:
            ValueError: prompt_mask and prompt have different shapes.
        """
        if getattr(self.model.config, "is_encoder_decoder", False):
            return Generation(prompt_mask=prompt_mask)
        ids = first_not_none(args[0] if args else None, kwargs.get("inputs"), kwargs.get("input_ids"))
        embeds = kwargs.get("inputs_embeds")
        prompt = first_not_none(embeds, ids)
        others = [Text(other, other.shape[1]) for other in _negative_prompts(kwargs) if not _same(other, ids)]
        if prompt is None:
            return Generation(prompt_mask=prompt_mask, others=others)
        if prompt_mask is not None and prompt_mask.shape != prompt.shape[:2]:
            raise ValueError(
                f"prompt_mask has shape {tuple(prompt_mask.shape)}, but generate was given {prompt.shape[0]} rows of "
                f"{prompt.shape[1]} tokens: pass one bool per token, True if it belongs to the prompt."
            )
        # If a cache holds the beginning, the mask covers all tokens, and the ids may be only the new ones.
        attention_mask = kwargs.get("attention_mask")
        attended = attention_mask.shape[-1] if isinstance(attention_mask, torch.Tensor) else 0
        length = max(prompt.shape[1], attended)
        return Generation(length, ids if embeds is None else None, prompt_mask, others=others)

    def _remember_answer(self, generation: Generation, cache: Any, output: Any) -> None:
        """Stores on a cache the first token that was generated after the prompt that filled it."""
        kept = CachedVectors.of(cache)
        sequences = getattr(output, "sequences", output)
        if kept is None or generation.input_ids is None or generation.length != kept.tokens:
            return
        given = generation.input_ids.shape[1]
        if isinstance(sequences, torch.Tensor) and len(sequences) == kept.batch and sequences.shape[1] > given:
            kept.answer = sequences[:, given : given + 1].clone()


def _negative_prompts(kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yields the ids that guidance starts from, for the given arguments of `generate`."""
    if isinstance(ids := kwargs.get("negative_prompt_ids"), torch.Tensor):
        yield ids
    for processor in kwargs.get("logits_processor") or ():
        if isinstance(ids := getattr(processor, "unconditional_context", {}).get("input_ids"), torch.Tensor):
            yield ids


def _same(ids: torch.Tensor, others: torch.Tensor | None) -> bool:
    return others is not None and torch.equal(ids, others.to(ids.device))
