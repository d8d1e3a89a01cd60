"""One call of a model with a batch: which rows its layers see."""

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
    """What a call has to know of its batch, which is a `batches.Batch`."""

    names: tuple[str, ...] | str
    places: RowPlaces
    stacks: dict[nn.Module, Any]
    others: dict[nn.Module, list[str]]
    caches: WeakSet[Any]


class Run:
    """One call with a batch.

    Args:
        batch: its adapters, stacked.
        model: the adapted model.
        given: what the caller passes to the model's forward or to `generate`.
        is_checked: whether the stacks are known to be what the adapters' weights are now.
    """

    def __init__(self, batch: Batch, model: nn.Module, given: Arguments, is_checked: bool) -> None:
        self.batch = batch
        self.model = model
        self.is_mixed = not isinstance(batch.names, str)
        # Who passes the rows here may be `generate`, whose calls of the model repeat them.
        self.expansion = 1 if given.given_rows is None else given.expansion
        self.is_checked = is_checked
        self.repeats = 1
        self.tokens: int | None = None
        self.items = given.row_of_each_item(len(batch.names))  # `generate` encodes images by itself

    def begin_call_of_model(self, arguments: Arguments) -> None:
        """Finds out which rows this call of the model has.

        Raises:
            ValueError: they are not those that there are names for.
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
        """Returns the dimension of a layer's input that has the rows, or the row of each image or sound.

        Raises:
            ValueError: neither is certain.
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
            f"adapter_names mixes adapters in a call of {rows} rows, but it is not certain to which of them the input of "
            f"{name} belongs, which has the shape {tuple(x.shape)}: experts see some of the tokens, vision towers see "
            "images, and some layers see what all rows share. Leave such layers out of target_modules, or run the rows "
            "of each adapter in a call of their own."
        )

    def names_for(self, module: nn.Module, x: Any) -> Sequence[str]:
        """Returns what PEFT's layer is to take for the adapter of each entry of its input's first dimension."""
        names = self.batch.others.get(module)
        if names is None or not isinstance(x, torch.Tensor):
            return NoAdapters(len(x) if isinstance(x, torch.Tensor) else len(self.batch.names))
        if len(set(names)) == 1:
            return names[:1] * len(x)
        if isinstance(module, LoraLayer) and type(module)._check_forward_args is not LoraLayer._check_forward_args:
            return names  # PEFT says that this layer mixes no adapters
        rows = self.rows_of(module, x)
        if isinstance(rows, list):
            return [names[row] for row in rows]
        if rows == 1:
            raise ValueError(
                f"{type(module).__name__} has tokens in its first dimension and rows in its second, where PEFT cannot mix "
                "adapters other than plain LoRA: run the rows of each adapter in a call of their own."
            )
        return [name for name in names for _ in range(len(x) // len(names))]


class PackedRun(Run):
    """One step of continuous batching: the rows of its batch are the tokens of the single row that the layers see."""

    def begin_call_of_model(self, arguments: Arguments) -> None:
        """Checks that there is a name for each token."""
        self.tokens = arguments.tokens
        if (arguments.rows, self.tokens) != (1, len(self.batch.names)):
            raise ValueError(
                f"A step of {len(self.batch.names)} tokens ran the model on {arguments.rows} x {self.tokens}."
            )

    def rows_of(self, layer: Any, x: torch.Tensor) -> int | list[int]:
        """Returns the dimension of a layer's input that has the tokens.

        Raises:
            ValueError: that is not certain.
        """
        if not self.is_packed(x):
            return self._as_rows(layer, x)
        return 1 - int(self._as_rows(layer, x.transpose(0, 1)))

    def is_packed(self, x: torch.Tensor) -> bool:
        """Whether a layer's input is a single row of tokens."""
        return x.shape[:2] == (1, len(self.batch.names)) and x.dim() == (3 if x.is_floating_point() else 2)

    def _as_rows(self, layer: Any, x: torch.Tensor) -> int:
        if self.batch.places.dimension(layer, x.shape, len(self.batch.names), 1) == 0:
            return 0
        raise ValueError(
            "Continuous batching mixes adapters, but it is not certain to which request each entry of an input of the "
            f"shape {tuple(x.shape)} belongs: leave the experts of a mixture out of target_modules, or use `generate`."
        )


class NoAdapters(Sequence[str]):
    """The names of rows for which PEFT's layers have no adapter to compute; they need no more than the number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __getitem__(self, index: Any) -> Any:
        return BASE_ROWS


class CurrentRun(threading.local):
    """The call with a batch that a thread is in.

    Attributes:
        run: the call; None outside of one.
    """

    run: Run | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # what is running belongs to the threads of this model, not to a copy of it
