"""LoRA factors of several adapters in one tensor, and the assignment of rows to adapters in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn import functional as F

from .candidates import lora_factors
from .homes import Homes, stacked


class RowFinder(Protocol):
    """Finds the rows of the batch in a layer's input."""

    def rows_of(self, layer: Any, x: torch.Tensor) -> int | list[int]:
        """Returns the dimension of the rows, or the row of each entry of the first dimension."""


@dataclass(frozen=True)
class Slots:
    """An arrangement of the rows of a batch in slots of equal size, so that each slot has one adapter.

    T adapters on n rows get slots of ⌈n/T⌉ rows. This makes fewer than 2T slots, and at most half of their places are
    padding, however the rows are distributed over the adapters.

    Attributes:
        adapters: the adapter of each slot.
        rows: the row in each place, slot by slot; None if these are all rows in order.
        places: the places that are not padding.
        padded: the row in each place, with a row of the same slot as padding.
    """

    adapters: tuple[str, ...]
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    padded: torch.Tensor | None = None

    @classmethod
    def of(cls, names: Sequence[str], adapters: Sequence[str], device: torch.device) -> Slots:
        """Arranges the rows of `names` that have one of `adapters`, of which there is at least one."""
        rows_of = {name: [row for row, own in enumerate(names) if own == name] for name in adapters}
        size = -(-sum(map(len, rows_of.values())) // len(rows_of))
        slots = [
            (name, rows[start : start + size]) for name, rows in rows_of.items() for start in range(0, len(rows), size)
        ]
        in_slots = tuple(name for name, _ in slots)
        rows = [row for _, own in slots for row in own]
        padded = [row for _, own in slots for row in own + own[-1:] * (size - len(own))]
        if padded == list(range(len(names))):
            return cls(in_slots)
        places = [slot * size + place for slot, (_, own) in enumerate(slots) for place in range(len(own))]
        return cls(in_slots, *(torch.tensor(indices, device=device) for indices in (rows, places, padded)))


class AdapterStack:
    """The LoRA factors of a layer's adapters, one per slot; smaller ranks are padded with zeros.

    Args:
        layer: the layer.
        slots: the arrangement of the rows in slots.
        names: the adapter of each row.
        rows_first: whether the layer is known to see (rows, …).
        homes: the memory in which the factors may be stacked; None to copy them.

    Attributes:
        A: (slots, r, in), r the highest rank.
        B: (slots, r, out). This layout is faster for a single token.
        scalings: α/r of each slot, (slots, 1, 1).
        scaling: α/r if it is the same for all slots, else None.
    """

    def __init__(self, layer: Any, slots: Slots, names: Sequence[str], rows_first: bool, homes: Homes | None) -> None:
        self.layer = layer
        self.slots = slots
        self.adapters = slots.adapters
        self.num_rows = len(names)
        self.slot_of_row = [self.adapters.index(name) if name in self.adapters else None for name in names]
        factors = [lora_factors(layer, name) for name in self.adapters]
        self.A, self.B = stacked(factors) if homes is None else homes.stacked(layer, factors)
        scalings = [layer.scaling[name] for name in self.adapters]
        self.scaling = scalings[0] if len(set(scalings)) == 1 else None
        self.scalings = torch.tensor(scalings, device=self.A.device).to(self.A.dtype).view(-1, 1, 1)
        self.A_transposed = self.A.transpose(1, 2)
        self.is_aligned = rows_first and slots.rows is None and len(self.adapters) == self.num_rows

    def add_to(self, result: torch.Tensor, x: torch.Tensor, run: RowFinder) -> torch.Tensor:
        """Returns y_b + s_t B_t A_t x_b for each row b with adapter t, computed in place if no gradient is needed.

        Args:
            result: y, (rows, …, out).
            x: (rows, …, in). The rows of the batch, each repeated as often as in the call, are in the dimension that
                `run` finds.
            run: the call.

        Raises:
            ValueError: the dimension of the rows cannot be determined.
        """
        if self.is_aligned and x.dim() == 3 and x.shape[0] == self.num_rows and _fit_in_place(result, x, self.A):
            hidden = torch.bmm(x, self.A_transposed)
            if self.scaling is None:
                return result.baddbmm_(hidden.mul_(self.scalings), self.B)
            return result.baddbmm_(hidden, self.B, alpha=self.scaling)
        rows = run.rows_of(self.layer, x)
        if isinstance(rows, list):
            return self._add_to_items(result, x, rows)
        if rows == 1:
            return self._add_to_rows(result.transpose(0, 1), x.transpose(0, 1)).transpose(0, 1)
        return self._add_to_rows(result, x)

    def _add_to_rows(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Computes `add_to` if the rows are the first dimension."""
        slots = self.slots
        per_row = x.to(self.A.device, self.A.dtype).reshape(self.num_rows, -1, x.shape[-1])
        per_place = per_row if slots.padded is None else per_row[slots.padded]
        hidden = torch.bmm(per_place.reshape(len(self.adapters), -1, x.shape[-1]), self.A_transposed)
        delta = torch.bmm(hidden * self.scalings, self.B).to(result.device, result.dtype)
        in_place = not torch.is_grad_enabled() and result.is_contiguous()
        if slots.rows is None or slots.places is None:
            delta = delta.reshape(result.shape)
            return result.add_(delta) if in_place else result + delta
        rows, places = slots.rows.to(result.device), slots.places.to(result.device)
        target = result.reshape(self.num_rows, -1, result.shape[-1])
        delta = delta.reshape(-1, *target.shape[1:])[places]
        if in_place:
            target.index_add_(0, rows, delta)
            return result
        return target.index_add(0, rows, delta).view_as(result)

    def _add_to_items(self, result: torch.Tensor, x: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
        """Computes `add_to` if the first dimension is images or sounds, each of which belongs to a row."""
        slots = [self.slot_of_row[row] for row in rows]
        items = torch.tensor([item for item, slot in enumerate(slots) if slot is not None], device=self.A.device)
        chosen = torch.tensor([slot for slot in slots if slot is not None], device=self.A.device)
        per_item = x.to(self.A.device, self.A.dtype)[items].flatten(1, -2)
        delta = torch.bmm(torch.bmm(per_item, self.A_transposed[chosen]) * self.scalings[chosen], self.B[chosen])
        delta = delta.to(result.device, result.dtype).reshape(len(items), *result.shape[1:])
        return result.index_add(0, items.to(result.device), delta)


class SharedAdapter:
    """The LoRA factors of a layer's single adapter for all rows, as views of its weights.

    The base model's weights evict everything else from the processor's caches at each token, so that every access to a
    Python object is slow. This object holds all that a call needs.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self.layer = layer
        self.name = name
        A, B = lora_factors(layer, name)
        self.A, self.B = A.detach().t(), B.detach().t()
        self.num_in, self.num_out = A.shape[1], B.shape[0]
        self.scaling = layer.scaling[name]

    def add_to(self, result: torch.Tensor, x: torch.Tensor, run: RowFinder) -> torch.Tensor:
        """Returns y + s B A x, computed in place if no gradient is needed.

        Args:
            result: y, (…, out).
            x: (…, in).
            run: the call, which is not used here.
        """
        if _fit_in_place(result, x, self.A) and result.is_contiguous():
            hidden = x.reshape(-1, self.num_in) @ self.A
            result.view(-1, self.num_out).addmm_(hidden, self.B, alpha=self.scaling)
            return result
        A, B = lora_factors(self.layer, self.name)
        delta = F.linear(F.linear(x.to(A.device, A.dtype), A), B) * self.scaling
        return result + delta.to(result.device, result.dtype)


def _fit_in_place(result: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> bool:
    """Returns whether the product of x and a factor can be added to the result in place."""
    dtype, device = factor.dtype, factor.device
    return (
        x.dtype is dtype
        and result.dtype is dtype
        and x.device == device
        and result.device == device
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)
    )


def is_plain(layer: Any, names: Sequence[str]) -> bool:
    """Returns whether a layer only computes y = W x + s B A x for these adapters, with weights that can be copied."""
    for name in names:
        if name not in layer.lora_A or name in layer.lora_variant:
            return False
        linears = layer.lora_A[name], layer.lora_B[name]
        if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
            return False
        if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
            return False
        if any(type(linear.weight) is not nn.Parameter or linear.weight.is_meta for linear in linears):
            return False
        if any(linear.weight.shape != (linear.out_features, linear.in_features) for linear in linears):  # a shard
            return False
        if not isinstance(layer.scaling[name], (int, float)):
            return False
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training:
            return False
    return len({(factor.device, factor.dtype) for name in names for factor in lora_factors(layer, name)}) == 1
