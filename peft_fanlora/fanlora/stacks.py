"""LoRA factors of several adapters in one tensor, and how rows and adapters come together in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Slots:
    """How the rows of a batch are put into slots of equal size, so that each slot has one adapter.

    T adapters on n rows get slots of ⌈n/T⌉ rows: that makes fewer than 2T slots, and at most half of the places in them
    are padding, however unevenly the rows are spread over the adapters.

    Attributes:
        adapters: the adapter of each slot.
        rows: the row in each place, slot after slot; None where these are all rows in their order.
        places: the places that are no padding.
        padded: the row in each place, with a row of the same slot in the padding.
    """

    adapters: tuple[str, ...]
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    padded: torch.Tensor | None = None

    @classmethod
    def of(cls, names: Sequence[str], adapters: Sequence[str], device: torch.device) -> Slots:
        """Arranges the rows of `names` that belong to one of `adapters`, of which there is at least one."""
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
    """The LoRA factors of a layer's adapters, one slot each; smaller ranks are filled up with zeros.

    Attributes:
        A: (slots, r, in), r the highest rank, times the adapter's α/r.
        B: (slots, r, out). This layout is the faster one for a single token.
    """

    def __init__(self, layer: Any, slots: Slots, num_rows: int) -> None:
        self.layer = layer
        self.slots = slots
        self.adapters = slots.adapters
        self.num_rows = num_rows
        factors = [_factors(layer, name) for name in self.adapters]
        rank = max(len(A) for A, _ in factors)
        scalings = torch.tensor([layer.scaling[name] for name in self.adapters], device=factors[0][0].device)
        A = torch.stack([_padded(A, rank) for A, _ in factors])
        self.A = A * scalings.to(A.dtype).view(-1, 1, 1)
        self.B = torch.stack([_padded(B.T, rank) for _, B in factors])
        self.A_transposed = self.A.transpose(1, 2)
        self.is_aligned = slots.rows is None and len(self.adapters) == num_rows

    def write(self, slot: int) -> None:
        """Copies an adapter's weights into its slot once more."""
        name = self.adapters[slot]
        A, B = _factors(self.layer, name)
        self.A[slot, : len(A)] = A * self.layer.scaling[name]
        self.B[slot, : len(A)] = B.T

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns y_b + s_t B_t A_t x_b for each row b with an adapter t, in place where no gradient is asked for.

        Args:
            result: y, (rows, …, out).
            x: (rows, …, in). Either has the batch's rows, each as often as `generate` repeated it.
        """
        if self.is_aligned and x.dim() == 3 and x.shape[0] == self.num_rows and _fit_in_place(result, x, self.A):
            return result.baddbmm_(torch.bmm(x, self.A_transposed), self.B)
        slots = self.slots
        per_row = x.to(self.A.device, self.A.dtype).reshape(self.num_rows, -1, x.shape[-1])
        per_place = per_row if slots.padded is None else per_row[slots.padded]
        hidden = torch.bmm(per_place.reshape(len(self.adapters), -1, x.shape[-1]), self.A_transposed)
        delta = torch.bmm(hidden, self.B).to(result.device, result.dtype)
        in_place = not torch.is_grad_enabled() and result.is_contiguous()
        if slots.rows is None or slots.places is None:
            delta = delta.view_as(result)
            return result.add_(delta) if in_place else result + delta
        rows, places = slots.rows.to(result.device), slots.places.to(result.device)
        target = result.reshape(self.num_rows, -1, result.shape[-1])
        delta = delta.reshape(-1, *target.shape[1:])[places]
        if in_place:
            target.index_add_(0, rows, delta)
            return result
        return target.index_add(0, rows, delta).view_as(result)


class SharedAdapter:
    """The LoRA factors of the one adapter that all rows of a layer have, as views on its own weights.

    Next to the weights of a base model, which fill the processor's caches at each token, every Python object that a layer
    looks at is slow to come by: so this keeps at hand what a call needs, and `Sources` tells whether it still holds.
    """

    def __init__(self, layer: Any, name: str) -> None:
        self.layer = layer
        self.adapters = (name,)
        A, B = _factors(layer, name)
        self.A, self.B = A.detach().t(), B.detach().t()
        self.num_in, self.num_out = A.shape[1], B.shape[0]
        self.scaling = layer.scaling[name]

    def write(self, slot: int) -> None:
        """Does nothing, as views see what is written to the weights."""

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns y + s B A x, in place where no gradient is asked for.

        Args:
            result: y, (…, out).
            x: (…, in).
        """
        if _fit_in_place(result, x, self.A) and result.is_contiguous():
            hidden = x.reshape(-1, self.num_in) @ self.A
            result.view(-1, self.num_out).addmm_(hidden, self.B, alpha=self.scaling)
            return result
        A, B = _factors(self.layer, *self.adapters)
        delta = F.linear(F.linear(x.to(A.device, A.dtype), A), B) * self.scaling
        return result + delta.to(result.device, result.dtype)


class Sources:
    """What stacks were made from, and how to tell whether that is still so.

    A frozen weight is the same as before if it is the same tensor at the same address, and nobody wrote to it by an
    operation that PyTorch counts. Trainable weights are copied at each call, because some optimizers write past that
    count. All of it is kept in flat lists, which are quick to look over.
    """

    def __init__(self, stacks: list[AdapterStack | SharedAdapter]) -> None:
        slots = [(stack, slot) for stack in stacks for slot in range(len(stack.adapters))]
        layers: list[Any] = [stack.layer for stack, _ in slots]
        self.slots = slots
        self.names = [stack.adapters[slot] for stack, slot in slots]
        self.layers = layers
        self.scalings = self._scalings()
        self.variants_of = [layer.lora_variant for layer in layers]
        dropouts = (layer.lora_dropout[name] for layer, name in zip(layers, self.names, strict=True))
        self.dropouts = [dropout for dropout in dropouts if not isinstance(dropout, nn.Identity)]

        self.linears_of = [part._modules for layer in layers for part in (layer.lora_A, layer.lora_B)]
        self.linear_names = [name for name in self.names for _ in range(2)]
        self.linears: list[Any] = list(map(dict.get, self.linears_of, self.linear_names))
        self.hooks = [hooks for linear in self.linears for hooks in (linear._forward_hooks, linear._forward_pre_hooks)]
        self.weights_of = [linear._parameters for linear in self.linears]
        self.weights = [weights["weight"] for weights in self.weights_of]
        self.addresses = list(map(torch.Tensor.data_ptr, self.weights))
        self.countable = not any(map(torch.Tensor.is_inference, self.weights))
        self.versions = self._versions()

    def _scalings(self) -> list[float]:
        return [layer.scaling.get(name) for layer, name in zip(self.layers, self.names, strict=True)]

    def _versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self.weights)) if self.countable else []

    def refresh(self) -> bool:
        trainable = list(map(attrgetter("requires_grad"), self.weights))
        same = (
            self.countable
            and not (torch.is_grad_enabled() and any(trainable))  # their stacks need a graph
            and all(map(is_, map(dict.get, self.linears_of, self.linear_names), self.linears))
            and all(map(is_, map(dict.get, self.weights_of, repeat("weight")), self.weights))
            and list(map(torch.Tensor.data_ptr, self.weights)) == self.addresses
            and self._scalings() == self.scalings
            and not any(self.hooks)
            and not any(map(dict.__contains__, self.variants_of, self.names))
            and not any(map(attrgetter("training"), self.dropouts))
        )
        if not same:
            return False
        before, self.versions = self.versions, self._versions()
        if self.versions != before or any(trainable):
            stale = [new or old != now for new, old, now in zip(trainable, before, self.versions, strict=True)]
            with torch.no_grad():
                for (stack, slot), A_stale, B_stale in zip(self.slots, stale[::2], stale[1::2], strict=True):
                    if A_stale or B_stale:
                        stack.write(slot)
        return True


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _fit_in_place(result: torch.Tensor, x: torch.Tensor, factor: torch.Tensor) -> bool:
    """Whether an operation in place can add a product of x and a factor to the result as they are."""
    dtype, device = factor.dtype, factor.device
    return (
        x.dtype is dtype
        and result.dtype is dtype
        and x.device == device
        and result.device == device
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(device.type)
    )


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    missing = rank - len(factor)
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor


def is_plain(layer: Any, names: Sequence[str]) -> bool:
    """Whether y = W x + s B A x is all that a layer computes for these adapters, with weights that can be copied."""
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
    return len({(factor.device, factor.dtype) for name in names for factor in _factors(layer, name)}) == 1
