"""Detects packed sequences: which sequence of a row each token belongs to, in all formats of transformers and TRL.

Packed sequences do not attend to each other, so each has its own prompt. A call marks where they begin by its
positions, the lengths for flash attention (`cu_seq_lens_q`, `cu_seq_lens_k`), `seq_idx`, or a 4-D mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..serving.call import cache_in


_BLOCKED = -1e4  # additive masks have at most this value where a token is not attended


def numbered_sequences(named: Mapping[str, Any], attention_mask: Any, attended: torch.Tensor) -> torch.Tensor | None:
    """Returns a number per token that increases wherever the call marks the beginning of a sequence.

    Args:
        named: the arguments of the call.
        attention_mask: its attention mask in any form, see `attended_tokens`.
        attended: which tokens are not padding, bool (batch, tokens).

    Returns:
        The numbers, (batch, tokens); None if only the positions can mark sequences.
    """
    batch, tokens = attended.shape
    starts = []
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if isinstance(ends := named.get(name), torch.Tensor):
            # Flash attention concatenates the rows of a batch.
            flat = torch.zeros(batch * tokens, dtype=torch.bool, device=attended.device)
            flat[ends[ends < len(flat)].long().to(flat.device)] = True
            starts.append(flat.view(batch, tokens))
    index = named.get("seq_idx")
    if isinstance(index, torch.Tensor) and index.dim() == 2 and index.shape[1] == tokens:
        changes = torch.zeros_like(attended)
        changes[:, 1:] = (index[:, 1:] != index[:, :-1]).to(attended.device)
        starts.append(changes)
    masks = list(attention_mask.values()) if isinstance(attention_mask, dict) else [attention_mask]
    if all(is_square(mask, tokens) for mask in masks):
        starts.append(attended & ~torch.stack([_sees_earlier(mask, attended) for mask in masks]).any(0))
    return torch.stack(starts).any(0).cumsum(1) if starts else None


def sequences(
    attended: torch.Tensor, positions: torch.Tensor | None, by_jumps: bool, numbers: torch.Tensor | None
) -> torch.Tensor:
    """Numbers the sequences of each row from 0.

    Args:
        attended: which tokens are not padding, bool (batch, tokens).
        positions: the positions, (batch, tokens) or (rows, batch, tokens): time, height and width of multimodal
            models, preceded by text positions if there are four rows.
        by_jumps: whether a sequence begins wherever a position is not the previous one plus one. Otherwise it begins
            where a position decreases or equals the row's lowest again.
        numbers: the return value of `numbered_sequences`.

    Returns:
        The sequence of each token, (batch, tokens).
    """
    batch, tokens = attended.shape
    counts = torch.where(attended, torch.arange(tokens, device=attended.device), -1).cummax(1).values
    before = torch.cat((counts.new_full((batch, 1), -1), counts[:, :-1]), 1)  # the attended token before each
    first, before = before < 0, before.clamp(min=0)
    starts = torch.zeros_like(attended)
    if numbers is not None:
        starts = numbers != numbers.gather(1, before)
    if positions is not None and positions.shape[-1] == tokens and positions.shape[-2:-1] in ((1,), (batch,)):
        positions = positions.to(attended.device).reshape(-1, *positions.shape[-2:]).expand(-1, batch, -1)
        has_text = len(positions) in (1, 4)
        positions = positions[:1] if has_text else positions
        steps = positions - positions.gather(2, before.expand_as(positions))
        lowest = positions[0].masked_fill(~attended, torch.iinfo(torch.int32).max).amin(1, keepdim=True)
        # Height and width increase and decrease within an image, while its tokens share the same time.
        starts = starts | (steps[0] < 0) | ((steps == 0).all(0) & (positions[0] == lowest))
        if by_jumps and has_text:
            starts = starts | (steps[0] != 1)
    return (starts & attended & ~first).cumsum(1)


def jumps_begin_sequences(module: nn.Module, named: Mapping[str, Any]) -> bool:
    """Returns whether transformers treats each jump of the positions as a new sequence, in a call without a mask.

    It does if it makes a causal mask without a cache; flash attention looks for the lowest position instead.
    """
    if named.get("position_ids") is None or cache_in(named) is not None:
        return False
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    use_cache = named.get("use_cache")
    use_cache = getattr(config, "use_cache", False) if use_cache is None else use_cache
    without = module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    if use_cache and not without:
        return False
    is_causal = named.get("is_causal", any(getattr(part, "is_causal", False) for part in module.modules()))
    return bool(is_causal) and "flash" not in str(getattr(config, "_attn_implementation", None))


def is_square(attention_mask: Any, tokens: int) -> bool:
    """Returns whether a mask specifies for each token which others it attends to."""
    return (
        isinstance(attention_mask, torch.Tensor)
        and attention_mask.dim() == 4
        and min(attention_mask.shape[-2:]) >= tokens
    )


def _sees_earlier(mask: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
    """Returns which tokens attend to an earlier token of their row, bool (batch, tokens)."""
    tokens = attended.shape[1]
    mask = mask[:, 0, :tokens, :tokens].to(attended.device)
    seen = mask if mask.dtype == torch.bool else mask > _BLOCKED
    return (seen.tril(-1) & attended.unsqueeze(1)).any(-1)
