"""One call of a model with a batch of adapters: which rows its layers see."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol
from weakref import WeakSet

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from ..serving.call import Arguments
from ..serving.rows import RowPlaces
from ..serving.tenants import BASE_ROWS, wrong_length


class Batch(Protocol):
    """The interface of a batch that a call uses, see `batches.Batch`."""

    names: tuple[str, ...] | str
    places: RowPlaces
    stacks: dict[nn.Module, Any]
    others: dict[nn.Module, list[str]]
    caches: WeakSet[Any]


class Run:
    """One call with a batch.

    Args:
        batch: the stacked adapters.
        model: the adapted model.
        given: the arguments of the model's forward or of `generate`.
        is_checked: whether the stacks are known to match the current weights.
    """

    def __init__(self, batch: Batch, model: nn.Module, given: Arguments, is_checked: bool) -> None:
        self.batch = batch
        self.model = model
        self.is_mixed = not isinstance(batch.names, str)
        # The arguments may be those of `generate`, which repeats the rows in its calls of the model.
        self.expansion = 1 if given.given_rows is None else given.expansion
        self.is_checked = is_checked
        self.repeats = 1
        self.tokens: int | None = None
        self.items = given.row_of_each_item(len(batch.names))  # `generate` may encode images outside of a model call

    def begin_call_of_model(self, arguments: Arguments) -> None:
        """Determines which rows this call of the model has.

        Raises:
            ValueError: their number does not match the names.
        """
        self.tokens = arguments.tokens
        if not self.is_mixed:
            return
        num_rows = len(self.batch.names)
        found = num_rows if arguments.rows is None else arguments.rows // arguments.choices
        self.repeats = found // num_rows
        if found not in (num_rows, num_rows * self.expansion):
            raise wrong_length(self.batch.names, found)
        self.repeats *= arguments.choices
        self.items = arguments.row_of_each_item(num_rows * self.repeats)

    def rows_of(self, layer: Any, x: torch.Tensor) -> int | list[int]:
        """Returns the dimension of a layer's input that holds the rows, or the row of each image or sound.

        Raises:
            ValueError: neither can be determined.
        """
        rows = len(self.batch.names) * self.repeats
        dimension = self.batch.places.dimension(layer, x.shape, rows, self.tokens)
        if dimension is not None:
            return dimension
        items = self.items.get(len(x)) if x.dim() > 2 and x.shape[1] != len(x) else None
        if items is not None:
            return [row // self.repeats for row in items]
        name = next((name for name, module in self.model.named_modules() if module is layer), type(layer).__name__)
        raise ValueError(
            f"adapter_names mixes adapters in a call of {rows} rows, but the rows cannot be found in the input of "
            f"{name}, which has the shape {tuple(x.shape)}: experts see some of the tokens, vision towers see images, "
            "and some layers have an input that is shared by all rows. Leave such layers out of target_modules, or "
            "run the rows of each adapter in a separate call."
        )

    def names_for(self, module: nn.Module, x: Any) -> Sequence[str]:
        """Returns the adapter of each entry of the first dimension of a PEFT layer's input."""
        names = self.batch.others.get(module)
        if names is None or not isinstance(x, torch.Tensor):
            return NoAdapters(len(x) if isinstance(x, torch.Tensor) else len(self.batch.names))
        if len(set(names)) == 1:
            return names[:1] * len(x)
        if isinstance(module, LoraLayer) and type(module)._check_forward_args is not LoraLayer._check_forward_args:
            return names  # PEFT raises its own error for layers that do not support mixed batches
        rows = self.rows_of(module, x)
        if isinstance(rows, list):
            return [names[row] for row in rows]
        if rows == 1:
            raise ValueError(
                f"{type(module).__name__} has tokens in its first dimension and rows in its second, where PEFT can "
                "only mix adapters of plain LoRA: run the rows of each adapter in a separate call."
            )
        return [name for name in names for _ in range(len(x) // len(names))]


class PackedRun(Run):
    """One step of continuous batching, in which the rows of the batch are the tokens of a single packed row."""

    def begin_call_of_model(self, arguments: Arguments) -> None:
        """Checks that there is one name per token."""
        self.tokens = arguments.tokens
        if (arguments.rows, self.tokens) != (1, len(self.batch.names)):
            raise ValueError(
                f"A step of {len(self.batch.names)} tokens ran the model on {arguments.rows} x {self.tokens}."
            )

    def rows_of(self, layer: Any, x: torch.Tensor) -> int | list[int]:
        """Returns the dimension of a layer's input that holds the tokens.

        Raises:
            ValueError: it cannot be determined.
        """
        if not self.is_packed(x):
            return self._as_rows(layer, x)
        return 1 - int(self._as_rows(layer, x.transpose(0, 1)))

    def is_packed(self, x: torch.Tensor) -> bool:
        """Returns whether a layer's input is a single row of tokens."""
        return x.shape[:2] == (1, len(self.batch.names)) and x.dim() == (3 if x.is_floating_point() else 2)

    def _as_rows(self, layer: Any, x: torch.Tensor) -> int:
        if self.batch.places.dimension(layer, x.shape, len(self.batch.names), 1) == 0:
            return 0
        raise ValueError(
            "Continuous batching mixes adapters, but it is not certain which request each entry of an input of shape "
            f"{tuple(x.shape)} belongs to: leave mixture-of-experts layers out of target_modules, or use `generate`."
        )


class NoAdapters(Sequence[str]):
    """The names of rows without an adapter, for PEFT's layers, which only use the length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __getitem__(self, index: Any) -> Any:
        return BASE_ROWS


class CurrentRun(threading.local):
    """The current thread's call with a batch.

    Attributes:
        run: the call; None outside of one.
    """

    run: Run | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # running calls are not copied
