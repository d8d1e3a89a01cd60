"""Scales the outputs of a projection by a vector, all of them or those of some sections."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputSlices:
    """The scaled outputs of a fused projection: `groups` repetitions of the same sections.

    A NeoX layer with 8 heads of width 64 is `OutputSlices(8, ((64, True), (64, False), (64, True)))`: query, key and
    value of each head are adjacent.

    Attributes:
        groups: how often the sections repeat.
        sections: (width, whether it is scaled) of each section, in order.
    """

    groups: int
    sections: tuple[tuple[int, bool], ...]

    @property
    def num_outputs(self) -> int:
        """The number of outputs of the projection."""
        return self.groups * sum(width for width, _ in self.sections)

    @property
    def num_scaled(self) -> int:
        """The number of outputs that a vector scales."""
        return self.groups * sum(width for width, scaled in self.sections if scaled)

    def spread(self, vector: torch.Tensor) -> torch.Tensor:
        """Returns a vector for all outputs: the given entries at the scaled outputs, and 1 everywhere else.

        Args:
            vector: (…, `num_scaled`).

        Returns:
            (…, `num_outputs`).
        """
        rows = vector.shape[:-1]
        widths = [width for width, scaled in self.sections if scaled]
        scaled_parts = iter(vector.reshape(*rows, self.groups, sum(widths)).split(widths, -1))
        parts = [
            next(scaled_parts) if scaled else vector.new_ones(*rows, self.groups, width)
            for width, scaled in self.sections
        ]
        return torch.cat(parts, -1).reshape(*rows, self.num_outputs)


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
