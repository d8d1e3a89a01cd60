"""Reads the information about the tokens of a call from its arguments."""

from __future__ import annotations

import torch

from ..serving.call import Arguments, first_not_none
from .packing import is_square, jumps_begin_sequences, numbered_sequences
from .prompt import Inputs, attended_tokens
from .state import Generation


_ENCODER_INPUTS = ("input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")


def inputs_of(arguments: Arguments, shape: tuple[int, int], generation: Generation | None, is_causal: bool) -> Inputs:
    """Returns the information about the tokens of a call that makes vectors.

    Args:
        arguments: the arguments of the call.
        shape: (rows, tokens) of the prompt.
        generation: the running `generate`.
        is_causal: whether the model generates text from left to right.

    Raises:
        ValueError: the prompt_mask has a different shape.
    """
    named, ids, memory, prompt_mask = (
        arguments.named,
        arguments.ids,
        arguments.memory,
        arguments.named.get("prompt_mask"),
    )
    device = first_not_none(memory, *(named.get(name) for name in _ENCODER_INPUTS)).device
    mask = first_not_none(named.get("encoder_attention_mask"), named.get("attention_mask"))
    if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.shape[1] != shape[1] and not is_causal:
        # A mask over audio samples or pixels says nothing about the encoder's tokens.
        mask = None
    generated_from = None
    if generation is not None:
        generated_from, is_own = generation.prompt_of(ids, shape[1])
        if is_own and prompt_mask is None and generation.prompt_mask is not None:
            prompt_mask = _fit(generation.prompt_mask, *shape)
    if prompt_mask is not None and tuple(prompt_mask.shape) != shape:
        raise ValueError(
            f"prompt_mask has shape {tuple(prompt_mask.shape)}, but the call has {shape[0]} rows of {shape[1]} "
            "tokens: pass one bool per token, True if it belongs to the prompt."
        )
    attended = attended_tokens(mask, *shape, device)
    return Inputs(
        attended=attended,
        input_ids=ids if memory is None else None,
        position_ids=None if memory is not None or is_square(mask, shape[1]) else named.get("position_ids"),
        by_jumps=mask is None and jumps_begin_sequences(arguments.model, named),
        numbers=numbered_sequences(named, mask, attended),
        labels=named.get("labels"),
        prompt_mask=None if prompt_mask is None else prompt_mask.to(device).bool(),
        generated_from=generated_from,
    )


def _fit(prompt_mask: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """Returns the prompt mask of `generate` for a call with repeated rows and generated tokens."""
    if batch % prompt_mask.shape[0] or tokens < prompt_mask.shape[1]:
        return prompt_mask
    mask = prompt_mask.repeat_interleave(batch // prompt_mask.shape[0], 0)
    return torch.cat((mask, mask.new_zeros(batch, tokens - mask.shape[1])), 1)
