"""Where the prompt ends.

A vector that saw the answer would leak it, so that training would look well and generation fail. What counts as the
prompt of a causal model is decided here alone, in this order, for each sequence:

1. the `prompt_mask` argument;
2. everything up to and including the first match of `prompt_end_token_ids`;
3. the leading run of labels that are -100, over attended tokens, where it is longer than one token: the first label
   of a packed sequence is -100 even in plain text;
4. in inference, the prompt of the running `generate`, else all attended tokens of the call that fills the cache.

Training with none of these raises. In multi-turn data the rules find the first prompt and nothing after it, because
its vectors serve the whole sequence, as they do in generation. Packed batches hold several sequences in a row, and
each has a prompt of its own. The prompt of an encoder, or of a model without a language head, is its whole attended
input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .packing import is_square, sequences


IGNORED = -100


@dataclass(frozen=True)
class Prompt:
    """Which tokens of a call are the prompt of which sequence.

    Attributes:
        mask: bool (batch, sequences, tokens); None where every token of every row is the prompt.
        segments: the sequence that each token belongs to, (batch, tokens); None where a row is one sequence.
    """

    mask: torch.Tensor | None
    segments: torch.Tensor | None = None

    def mask_for(self, batch: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Returns the mask, written out, on a block's device."""
        if self.mask is None:
            return torch.ones(batch, 1, tokens, dtype=torch.bool, device=device)
        return self.mask.to(device)

    def length(self, tokens: int) -> int:
        """How many token slots the prompt reaches over, padding included, in a call of so many tokens."""
        if self.mask is None:
            return tokens
        slots = self.mask.flatten(0, 1).any(0).nonzero()
        return int(slots[-1]) + 1 if len(slots) else 0


@dataclass(frozen=True)
class Inputs:
    """What a call says about its tokens; tensors are (batch, tokens), and None where the call does not have them.

    Attributes:
        attended: bool, which tokens are not padding.
        input_ids: the token ids.
        position_ids: the positions, which start again for each sequence of a packed batch; also (rows, batch, tokens).
        by_jumps: whether every jump of the positions begins a sequence.
        numbers: a number for each token that grows where the call says by other means that a sequence begins.
        labels: the labels of the tokens, where -100 marks those without a loss.
        prompt_mask: bool, the prompt as the caller gives it.
        generated_from: how many of the tokens are the prompt of the running `generate`; None outside of one.
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
        attention_mask: a 2-D mask, a 4-D mask (bool, or added to the scores) in which a token attends to itself unless
            it is padding, a dict of such masks by layer type, or None, when every token is attended.
        batch: the rows of the call.
        tokens: the tokens of each row.
        device: where the tokens are.
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
    """Returns the prompt of each sequence of an encoder: all attended tokens, or those of the `prompt_mask`."""
    segments = _segments(inputs)
    member = _members(segments, inputs.attended)
    mask = member if inputs.prompt_mask is None else member & inputs.prompt_mask.unsqueeze(1)
    return Prompt(mask, segments if member.shape[1] > 1 else None)


def causal_prompt(inputs: Inputs, prompt_end: tuple[int, ...] | None, training: bool) -> Prompt:
    """Returns the prompt of a call of a causal model, by the rules at the top of this module.

    Args:
        inputs: what the call says.
        prompt_end: the token ids that end every prompt.
        training: whether a sequence without a known prompt is an error.

    Raises:
        ValueError: in training, nothing says where the prompt of some sequence ends.
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
    """Rule 2: (prompt mask, which sequences have a match)."""
    ids = inputs.input_ids
    if prompt_end is None or ids is None or ids.shape[1] < len(prompt_end):
        return None
    width = len(prompt_end)
    end = torch.tensor(prompt_end, device=ids.device)
    matches = (ids.unfold(1, width, 1) == end).all(-1).unsqueeze(1)
    # A match counts where all of its tokens lie in the sequence, so that it cannot reach over a border.
    matches = matches & member.unfold(2, width, 1).all(-1)
    found = matches.any(-1)
    last = matches.int().argmax(-1, keepdim=True) + width - 1
    return member & (torch.arange(ids.shape[1], device=ids.device) <= last), found


def _by_labels(inputs: Inputs, member: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Rule 3: (prompt mask, which sequences begin with more than one token without a label)."""
    if inputs.labels is None or inputs.labels.shape != inputs.attended.shape:
        return None
    labelled = member & (inputs.labels != IGNORED).to(member.device).unsqueeze(1)
    mask = member & (labelled.cumsum(-1) == 0)
    return mask, mask.sum(-1) > 1


def _check_found(
    found: torch.Tensor, member: torch.Tensor, inputs: Inputs, prompt_end: tuple[int, ...] | None
) -> None:
    """Raises where a sequence that is trained on has no known prompt; one token alone, such as padding, is none."""
    trained_on = member.sum(-1) > 1
    if inputs.labels is not None and inputs.labels.shape == inputs.attended.shape:
        trained_on = trained_on & (member & (inputs.labels != IGNORED).to(member.device).unsqueeze(1)).any(-1)
    missing = trained_on & ~found
    if not missing.any():
        return
    looked_for = "it has none" if prompt_end is None else f"{list(prompt_end)} does not occur there"
    labels = "the call has no labels" if inputs.labels is None else "its labels do not begin with a run of -100"
    raise ValueError(
        f"PARA cannot tell where the prompt ends in {int(missing.sum())} of {int(trained_on.sum())} training sequences, "
        "and must not read the answer: the call has no prompt_mask, the config's prompt_end_token_ids did not help "
        f"({looked_for}), and {labels}. Either pass prompt_mask (bool, batch x tokens) to the model, or set "
        "ParaConfig(prompt_end_token_ids=get_prompt_end_token_ids(tokenizer)), or train on prompt-completion data, whose "
        "prompts are labelled -100."
    )
