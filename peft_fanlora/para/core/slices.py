"""Which outputs of a projection a vector scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class OutputSlices:
    """Which outputs of a fused projection are scaled: `groups` repetitions of the same run of sections.

    A NeoX layer with 8 heads of width 64 is `OutputSlices(8, ((64, True), (64, False), (64, True)))`: each head's
    query, key and value lie side by side.

    Attributes:
        groups: how often the sections repeat.
        sections: the (width, scaled or not) of each section, in order.
    """

    groups: int
    sections: tuple[tuple[int, bool], ...]

    @property
    def num_outputs(self) -> int:
        """All outputs of the projection."""
        return self.groups * sum(width for width, _ in self.sections)

    @property
    def num_scaled(self) -> int:
        """The outputs that a vector scales."""
        return self.groups * sum(width for width, scaled in self.sections if scaled)

    def spread(self, vector: torch.Tensor) -> torch.Tensor:
        """Puts a vector's entries where the scaled outputs are, and 1 everywhere else.

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
