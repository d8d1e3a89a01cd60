"""The arguments of a model call, used by both methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.continuous_batching import PagedAttentionCache
from transformers.generation.utils import ALL_CACHE_NAMES


_CACHE_NAMES = tuple(dict.fromkeys((*ALL_CACHE_NAMES, "past_key_values", "cache_params")))
"""Since transformers 5.24 the argument is called `cache`; the names before it are still accepted."""
_DECODED = ("decoder_input_ids", "decoder_inputs_embeds")
_TEXT = ("input_ids", "inputs_embeds")
_ITEMS = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}
"""Inputs that contain images or sounds, each of which belongs to a row of the text, and the kind of item."""

Shape = tuple[int | None, int | None]
"""(rows, tokens per row); None for what the arguments do not tell."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a model's forward or of `generate`, and values derived from them.

    The inputs of a multiple-choice model, (batch, choices, tokens), are stored with one row per choice.

    Attributes:
        model: the model that is called.
        named: the arguments by name.
        choices: the number of choices per row of the caller's input.
    """

    model: nn.Module
    named: Mapping[str, Any]
    choices: int = 1

    @classmethod
    def of(cls, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """Returns the arguments of a call."""
        named = kwargs if not args else {**dict(zip(_names(cast(Any, type(model))), args, strict=False)), **kwargs}
        return cls(model, *_choices_as_rows(model, named))

    @property
    def rows(self) -> int | None:
        """The number of rows that the layers see: those of the text if there is one, else of the main input."""
        return self._shape[0]

    @property
    def tokens(self) -> int | None:
        """The number of tokens per row."""
        return self._shape[1]

    @property
    def _shape(self) -> Shape:
        text = self._first_text((*_DECODED, *_TEXT))
        if text is not None:
            return text.shape[0], text.shape[1]
        main = self.named.get(getattr(self.model, "main_input_name", None) or "")
        values = (value for value in (main, *self.named.values()) if isinstance(value, torch.Tensor) and value.dim())
        first = next(values, None)
        return (None, None) if first is None else (len(first), first.shape[1] if first.dim() == 3 else None)

    @property
    def text_shape(self) -> Shape:
        """(rows, tokens) of the text that contains the prompt; for decoder inputs only the rows."""
        text = self._first_text(_TEXT)
        if text is not None:
            return text.shape[0], text.shape[1]
        decoded = self._first_text(_DECODED)
        return (None if decoded is None else len(decoded)), None

    def _first_text(self, names: Sequence[str]) -> torch.Tensor | None:
        for name in names:
            if isinstance(value := self.named.get(name), torch.Tensor) and value.dim() >= 2:
                return value
        return None

    @property
    def ids(self) -> torch.Tensor | None:
        """The token ids, (rows, tokens)."""
        return self.named.get("input_ids")

    @property
    def cache(self) -> Any:
        """The KV cache that the call continues or fills."""
        return cache_in(self.named)

    @property
    def is_paged(self) -> bool:
        """Whether it is a call of continuous batching, according to its cache."""
        return isinstance(self.named.get("cache"), PagedAttentionCache)

    @property
    def memory(self) -> torch.Tensor | None:
        """The encoder's output in the arguments, (rows, tokens, d)."""
        memory = first_not_none(self.named.get("encoder_hidden_states"), self.named.get("encoder_outputs"))
        return memory if memory is None or isinstance(memory, torch.Tensor) else memory[0]

    @property
    def given_rows(self) -> int | None:
        """The number of rows that the caller passes to forward or `generate`; None if PEFT does not pass them on."""
        if not isinstance(self.model, PreTrainedModel):
            return self.rows
        names = (*_TEXT, "inputs", self.model.main_input_name)
        values = (self.named[name] for name in names if isinstance(self.named.get(name), torch.Tensor))
        return next((len(value) // self.choices for value in values), None)

    @property
    def expansion(self) -> int:
        """How often `generate` repeats each row, one after the other; guidance may repeat the whole batch instead."""
        given = next((value for value in self.named.values() if isinstance(value, GenerationConfig)), None)
        configs = given, getattr(self.model, "generation_config", None)
        numbers = []
        for name in ("num_beams", "num_return_sequences"):
            values = (self.named.get(name), *(getattr(config, name, None) for config in configs))
            numbers.append(first_not_none(*values, 1))
        return max(numbers)

    def row_of_each_item(self, rows: int) -> dict[int, list[int] | None]:
        """Returns the row of each image or sound, determined by the placeholder tokens in the text.

        Args:
            rows: the number of rows of the call.

        Returns:
            Number of items -> the row of each item, since a layer only knows how many it sees; None if ambiguous.
        """
        ids = self.ids
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != rows:
            return {}
        found: dict[int, list[int] | None] = {}
        for name, what in _ITEMS.items():
            items = self.named.get(name)
            if not isinstance(items, torch.Tensor) or items.dim() < 3:
                continue
            own = _rows_of_items(ids, len(items), list(_placeholders(self.model, what)))
            found[len(items)] = own if found.get(len(items), own) == own else None
        return found


@lru_cache(maxsize=64)
def _names(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def _choices_as_rows(model: nn.Module, named: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
    """Returns a call's arguments with one row per choice, and the number of choices per row.

    The third dimension of an audio model may hold codebooks instead.
    """
    for name, dims in (("input_ids", 3), ("inputs_embeds", 4)):
        value = named.get(name)
        if isinstance(value, torch.Tensor) and value.dim() == dims:
            if hasattr(getattr(model, "config", None), "num_codebooks"):
                break
            shape = value.shape[:2]
            flat = {
                name: each.flatten(0, 1)
                for name, each in named.items()
                if isinstance(each, torch.Tensor) and each.dim() > 2 and each.shape[:2] == shape
            }
            return {**named, **flat}, shape[1]
    return named, 1


def _placeholders(model: Any, what: str) -> Iterator[int]:
    """Yields the ids of the placeholder tokens that are replaced by features of images or sounds."""
    config = getattr(model, "config", None)
    values = (getattr(config, f"{what}_token_{suffix}", None) for suffix in ("id", "index"))
    return (value for value in values if isinstance(value, int))


def _rows_of_items(ids: torch.Tensor, items: int, placeholders: list[int]) -> list[int] | None:
    """Returns the row of each item: one per row, or, for items of equal size, as many as the row has room for."""
    in_row = torch.isin(ids, torch.tensor(placeholders, device=ids.device)).sum(1).tolist()
    if not all(in_row) or len(in_row) != items:
        size, rest = divmod(sum(in_row), items)
        if rest or not size or any(number % size for number in in_row):
            return None
        in_row = [number // size for number in in_row]
    else:
        in_row = [1] * items
    return [row for row, number in enumerate(in_row) for _ in range(number)]


def cache_in(values: Any) -> Any:
    """Returns the KV cache in a call's arguments or output."""
    if isinstance(values, tuple):
        return next((value for value in values if hasattr(value, "get_seq_length")), None)
    get = values.get if isinstance(values, Mapping) else functools.partial(getattr, values)
    named = (get(name, None) for name in _CACHE_NAMES)
    # The argument `state` of robotics models is a tensor, not a cache.
    return next((value for value in named if not isinstance(value, (torch.Tensor, type(None)))), None)


def first_not_none(*values: Any) -> Any:
    """Returns the first value that is not None, or None."""
    return next((value for value in values if value is not None), None)
