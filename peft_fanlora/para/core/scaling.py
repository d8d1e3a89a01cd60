"""The scaling of a projection's output by a vector."""

from __future__ import annotations

import torch


def scale(
    result: torch.Tensor, vector: torch.Tensor, segments: torch.Tensor | None = None, in_place: bool = False
) -> torch.Tensor:
    """Returns the output of a projection times its adjusting vector, y' = l ⊙ y [S].

    Args:
        result: y, (batch, …, outputs), or (batch * tokens, outputs) if the model flattens its tokens.
        vector: l, (batch, sequences, outputs).
        segments: the sequence of each token in a packed batch, (batch, tokens).
        in_place: whether to write into `result`, which is faster for a single token.
    """
    if segments is not None:
        rows = torch.arange(vector.shape[0], device=vector.device).unsqueeze(1)
        vector = vector[rows, segments.to(vector.device)]
    if result.dim() == 2:
        batch, _, outputs = vector.shape
        vector = vector.expand(batch, result.shape[0] // batch, outputs).reshape(-1, outputs)
    elif result.dim() > 3:
        vector = vector.reshape(vector.shape[0], *(1 for _ in result.shape[2:]), vector.shape[-1])
    return result.mul_(vector) if in_place else (result * vector).to(result.dtype)
