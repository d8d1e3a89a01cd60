"""Memory that a layer's stack shares with its adapters, so that a mixed batch needs no second copy of their weights.

A product over all adapters of a batch needs their factors in one tensor. When a batch is stacked, weights that nothing
else can depend on move into that tensor and become views of it. They stay there until the layer's next batch with
other adapters, or until adapters are changed or trained, or the model is copied; then they get memory of their own.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..serving.tenants import TenantMixin


Factors = tuple[torch.Tensor, torch.Tensor]
"""A, (r, in), and B, (out, r)."""

_SHARE_TO_MOVE = 1 / 4
"""The share of a layer's adapters that a batch must have for their factors to be moved."""

_BYTES_TO_TRIM = 2**25


class Homes:
    """The shared memory of the layers of one model."""

    def __init__(self) -> None:
        self._of: dict[nn.Module, Home] = {}
        self._num_moved = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # the weights of a copied model have memory of their own

    def stacked(self, layer: Any, factors: Sequence[Factors]) -> Factors:
        """Stacks a layer's factors like `stacked`, by moving them, or at no cost if they are those of the last stack.

        Moving takes more time than copying, so factors of few of the layer's adapters are copied. No call of the model
        may run in another thread.
        """
        if len(factors) < _SHARE_TO_MOVE * len(layer.lora_A):
            return stacked(factors)
        last = self._of.get(layer)
        if last is None or not last.has(factors):
            home = self._of[layer] = Home(factors, last)
            if last is not None:
                last.give_back()
            self._num_moved += sum(part.nbytes for part in home.stack)
            if self._num_moved > _BYTES_TO_TRIM:
                self._num_moved = 0
                _trim()
        return self._of[layer].stack

    def give_back(self) -> None:
        """Gives all weights memory of their own."""
        while self._of:
            self._of.popitem()[1].give_back()


class HomesMixin(TenantMixin):
    """What a tuner does so that other code finds each weight in memory of its own, apart from inference."""

    @cached_property
    def _homes(self) -> Homes:
        return Homes()

    def train(self, mode: bool = True) -> Any:
        """Sets training mode, see `torch.nn.Module.train`. Optimizers may need contiguous weights."""
        if mode:
            self._give_back()
        return super().train(mode)  # type: ignore[misc]

    def __getstate__(self) -> Any:
        self._give_back()  # pickle would write the whole stack for each weight in it
        return super().__getstate__()

    def _give_back(self) -> None:
        with self.call_gate.alone() as is_alone:
            if is_alone:
                self._homes.give_back()

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Returns an adapter's tensors without the memory of others, which `torch.save` would write as well."""
        found = super()._get_adapter_state_dict(*args, **kwargs)
        return {name: tensor.clone() if _is_part(tensor) else tensor for name, tensor in found.items()}


class Home:
    """One layer's stack, and the factors that were moved into it.

    Args:
        factors: the factors of each slot.
        last: the layer's earlier stack, from which factors may move.
    """

    def __init__(self, factors: Sequence[Factors], last: Home | None) -> None:
        self.stack = stacked(factors)
        self.factors = factors
        self._places = []
        for own, *slots in zip(factors, *self.stack, strict=True):
            rank = len(own[0])
            views = slots[0][:rank], slots[1][:rank].t()
            if all(_is_movable(factor) or (last is not None and last._holds(factor)) for factor in own):
                own[0].data, own[1].data = views
            self._places += [_place(view) for view in views]

    def has(self, factors: Sequence[Factors]) -> bool:
        """Returns whether the stack consists of these factors."""
        return self._places == [_place(factor) for own in factors for factor in own]

    def give_back(self) -> None:
        """Gives the factors that are still here memory of their own."""
        for own in self.factors:
            for factor in own:
                if self._holds(factor):
                    factor.data = factor.data.clone(memory_format=torch.contiguous_format)

    def _holds(self, factor: torch.Tensor) -> bool:
        memory = factor.untyped_storage().data_ptr()
        return any(memory == part.untyped_storage().data_ptr() for part in self.stack)


def stacked(factors: Sequence[Factors]) -> Factors:
    """Stacks the factors of a layer; smaller ranks are padded with zeros.

    Returns:
        A, (slots, r, in), and B, (slots, r, out), r the highest rank.
    """
    rank = max(len(A) for A, _ in factors)
    return torch.stack([_padded(A, rank) for A, _ in factors]), torch.stack([_padded(B.T, rank) for _, B in factors])


def _place(factor: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    return factor.data_ptr(), factor.shape, factor.stride()


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    missing = rank - len(factor)
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor


def _is_movable(factor: torch.Tensor) -> bool:
    """Returns whether a frozen weight has memory of its own that no other tensor or process is known to use."""
    is_shared = factor.device.type == "cpu" and factor.is_shared()
    return not (_is_part(factor) or is_shared or factor.requires_grad or factor.is_inference())


def _is_part(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is a view of a part of its memory."""
    is_dense = type(tensor) in (torch.Tensor, nn.Parameter)
    return is_dense and tensor.untyped_storage().nbytes() > tensor.nbytes


def _trim() -> None:
    """Returns freed memory to the system. glibc keeps blocks between others that are in use, and reuses few of them."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
