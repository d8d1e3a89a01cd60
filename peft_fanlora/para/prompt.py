"""Determines where the prompt of each sequence ends.

A vector computed from the answer would leak it: training would look good, and generation would fail. This module alone
decides which tokens are the prompt of a causal model, by the first of these rules that applies to a sequence:

1. the `prompt_mask` argument;
2. everything up to and including the first match of `prompt_end_token_ids`;
3. the leading run of labels that are -100, over attended tokens, if it is longer than one token: the first label of a
   packed sequence is -100 even in plain text;
4. in inference, the prompt of the running `generate`, else all attended tokens of the call that fills the cache.

Training without any of these raises an error. In multi-turn data the rules find only the first prompt, because its
vectors apply to the whole sequence, as in generation. Packed batches hold several sequences per row, each with its own
prompt. The prompt of an encoder, or of a model without a language modeling head, is its whole attended input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .packing import is_square, sequences


IGNORED = -100


@dataclass(frozen=True)
class Prompt:
    """The prompt tokens of each sequence of a call.

    Attributes:
        mask: bool (batch, sequences, tokens); None if every token of every row is part of the prompt.
        segments: the sequence that each token belongs to, (batch, tokens); None if each row is one sequence.
    """

    mask: torch.Tensor | None
    segments: torch.Tensor | None = None

    def mask_for(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Returns the mask as a tensor on a block's device."""
        if self.mask is None:
            return torch.ones(batch, 1, tokens, dtype=torch.bool, device=device)
        return self.mask.to(device)

    def length(self, tokens: int) -> int:
        """Returns the number of token slots up to the end of the prompt, including padding."""
        if self.mask is None:
            return tokens
        slots = self.mask.flatten(0, 1).any(0).nonzero()
        return int(slots[-1]) + 1 if len(slots) else 0


@dataclass(frozen=True)
class Inputs:
    """The information about the tokens of a call. Tensors are (batch, tokens), and None if the call has none.

    Attributes:
        attended: bool, which tokens are not padding.
        input_ids: the token ids.
        position_ids: the positions, which restart for each sequence of a packed batch; also (rows, batch, tokens).
        by_jumps: whether every jump of the positions begins a sequence.
        numbers: a number per token that increases where the call marks the beginning of a sequence by other means.
        labels: the labels of the tokens; -100 marks tokens without a loss.
        prompt_mask: bool, the prompt as given by the caller.
        generated_from: how many of the tokens are the prompt of the running `generate`; None outside of `generate`.
    """

    attended: torch.Tensor
    input_ids: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    by_jumps: bool = False
    numbers: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    generated_from: int | None = None


def attended_tokens(attention_mask: Any, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Returns which tokens of a call are not padding, bool (batch, tokens).

    Args:
        attention_mask: a 2-D mask, a 4-D mask (bool or additive) in which every token that is not padding attends to
            itself, a dict of such masks by layer type, or None if all tokens are attended.
        batch: the number of rows.
        tokens: the number of tokens per row.
        device: the device of the tokens.
    """
    if isinstance(attention_mask, dict):
        attention_mask = next((mask for mask in attention_mask.values() if mask is not None), None)
    if isinstance(attention_mask, torch.Tensor):
        if attention_mask.dim() == 2 and attention_mask.shape[1] >= tokens:
            return attention_mask[:, -tokens:].to(device).bool()
        if is_square(attention_mask, tokens):
            own = attention_mask[:, 0, :tokens, :tokens].diagonal(dim1=-2, dim2=-1).to(device)
            return (own if own.dtype == torch.bool else own == 0).expand(batch, tokens)
    return torch.ones(batch, tokens, dtype=torch.bool, device=device)


def whole_input(inputs: Inputs) -> Prompt:
    """Returns the prompt of each encoder sequence: all attended tokens, or those of the `prompt_mask`."""
    segments = _segments(inputs)
    member = _members(segments, inputs.attended)
    mask = member if inputs.prompt_mask is None else member & inputs.prompt_mask.unsqueeze(1)
    return Prompt(mask, segments if member.shape[1] > 1 else None)


def causal_prompt(inputs: Inputs, prompt_end: tuple[int, ...] | None, training: bool) -> Prompt:
    """Returns the prompt of a call of a causal model, by the rules in the docstring of this module.

    Args:
        inputs: the information about the tokens.
        prompt_end: the token ids that end every prompt.
        training: whether to raise if the prompt of a sequence is unknown.

    Raises:
        ValueError: in training, the end of the prompt of a sequence is unknown.
    """
    segments = _segments(inputs)
    member = _members(segments, inputs.attended)
    if inputs.generated_from is not None:
        member = member & (torch.arange(member.shape[-1], device=member.device) < inputs.generated_from)
    several = segments if member.shape[1] > 1 else None
    if inputs.prompt_mask is not None:
        return Prompt(member & inputs.prompt_mask.unsqueeze(1), several)

    mask, found = member, torch.zeros_like(member[..., 0])
    for rule in (_by_end_tokens(inputs, member, prompt_end), _by_labels(inputs, member)):
        if rule is not None:
            rule_mask, rule_found = rule
            mask = torch.where((rule_found & ~found).unsqueeze(-1), rule_mask, mask)
            found = found | rule_found
    if training and inputs.generated_from is None:
        _check_found(found, member, inputs, prompt_end)
    return Prompt(mask, several)


def _segments(inputs: Inputs) -> torch.Tensor:
    """Numbers the sequences of each row, (batch, tokens)."""
    return sequences(inputs.attended, inputs.position_ids, inputs.by_jumps, inputs.numbers)


def _members(segments: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Returns which attended tokens belong to which sequence, bool (batch, sequences, tokens)."""
    sequences = torch.arange(int(segments.max()) + 1, device=segments.device)
    return (segments.unsqueeze(1) == sequences.view(1, -1, 1)) & attended.unsqueeze(1)


def _by_end_tokens(
    inputs: Inputs, member: torch.Tensor, prompt_end: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Applies rule 2 and returns (prompt mask, which sequences have a match)."""
    ids = inputs.input_ids
    if prompt_end is None or ids is None or ids.shape[1] < len(prompt_end):
        return None
    width = len(prompt_end)
    end = torch.tensor(prompt_end, device=ids.device)
    matches = (ids.unfold(1, width, 1) == end).all(-1).unsqueeze(1)
    # A match must lie entirely within one sequence.
    matches = matches & member.unfold(2, width, 1).all(-1)
    found = matches.any(-1)
    last = matches.int().argmax(-1, keepdim=True) + width - 1
    return member & (torch.arange(ids.shape[1], device=ids.device) <= last), found


def _by_labels(inputs: Inputs, member: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Applies rule 3 and returns (prompt mask, which sequences begin with more than one token without a label)."""
    if inputs.labels is None or inputs.labels.shape != inputs.attended.shape:
        return None
    labelled = member & (inputs.labels != IGNORED).to(member.device).unsqueeze(1)
    mask = member & (labelled.cumsum(-1) == 0)
    return mask, mask.sum(-1) > 1


def _check_found(
    found: torch.Tensor, member: torch.Tensor, inputs: Inputs, prompt_end: tuple[int, ...] | None
) -> None:
    """Raises if the prompt of a training sequence is unknown. Single tokens, such as padding, are not counted."""
    trained_on = member.sum(-1) > 1
    if inputs.labels is not None and inputs.labels.shape == inputs.attended.shape:
        trained_on = trained_on & (member & (inputs.labels != IGNORED).to(member.device).unsqueeze(1)).any(-1)
    missing = trained_on & ~found
    if not missing.any():
        return
    looked_for = "not set" if prompt_end is None else f"{list(prompt_end)} does not occur there"
    labels = "the call has no labels" if inputs.labels is None else "its labels do not begin with a run of -100"
    raise ValueError(
        f"PARA cannot tell where the prompt ends in {int(missing.sum())} of {int(trained_on.sum())} training "
        "sequences, and must not read the answer: the call has no prompt_mask, the config's prompt_end_token_ids did "
        f"not help ({looked_for}), and {labels}. Either pass prompt_mask (bool, batch x tokens) to the model, or set "
        "ParaConfig(prompt_end_token_ids=get_prompt_end_token_ids(tokenizer)), or train on prompt-completion data, "
        "whose prompts have the label -100."
    )
