"""Reads the arguments of one call of a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel


_TEXT = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")
_ITEMS = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}
"""Inputs whose entries are images or sounds, each of which belongs to a row of the text, and what they are called."""


def named_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name."""
    if not args:
        return dict(kwargs)
    return {**dict(zip(_argument_names(cast(Any, type(model))), args, strict=False)), **kwargs}


@lru_cache(maxsize=64)
def _argument_names(kind: Any) -> list[str]:
    return list(inspect.signature(kind.forward).parameters)[1:]


def choices_as_rows(model: nn.Module, named: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Returns a call's arguments as the layers of a multiple-choice model see them, and how many choices a row has.

    Such a model takes its tokens as (batch, choices, tokens) and makes a row of each choice. The third dimension of a
    model of sound may hold codebooks instead.
    """
    has_codebooks = hasattr(getattr(model, "config", None), "num_codebooks")
    ids, embeds = named.get("input_ids"), named.get("inputs_embeds")
    for value, dims in ((ids, 3), (embeds, 4)):
        if isinstance(value, torch.Tensor) and value.dim() == dims and not has_codebooks:
            shape = value.shape[:2]
            flat = {
                name: each.flatten(0, 1)
                for name, each in named.items()
                if isinstance(each, torch.Tensor) and each.dim() > 2 and each.shape[:2] == shape
            }
            return {**named, **flat}, shape[1]
    return named, 1


def rows_and_tokens(model: nn.Module, named: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Returns how many rows a call has, and how many tokens each of them has; None for what its arguments do not say.

    The rows are those of the text, which may come with more images or fewer, or else those of the model's main input.

    Args:
        model: the model.
        named: the arguments of the call, by name.
    """
    for name in _TEXT:
        if isinstance(value := named.get(name), torch.Tensor) and value.dim() >= 2:
            return value.shape[0], value.shape[1]
    main = named.get(getattr(model, "main_input_name", None) or "")
    tensors = (value for value in (main, *named.values()) if isinstance(value, torch.Tensor) and value.dim())
    first = next(tensors, None)
    return (None, None) if first is None else (len(first), first.shape[1] if first.dim() == 3 else None)


def given_rows(model: nn.Module, named: Mapping[str, Any]) -> int | None:
    """Returns how many rows a caller passes to a model's forward or to `generate`; None where he does not pass them here.

    Args:
        model: the model.
        named: the arguments, by name; PEFT may keep some of them back.
    """
    if not isinstance(model, PreTrainedModel):
        return rows_and_tokens(model, named)[0]
    names = (*_TEXT[2:], "inputs", model.main_input_name)
    values = (named[name] for name in names if isinstance(name, str) and isinstance(named.get(name), torch.Tensor))
    return next((len(value) for value in values), None)


def row_of_each_item(model: nn.Module, named: Mapping[str, Any], rows: int) -> dict[int, list[int] | None]:
    """Returns for a number of images or sounds the row of each, as the placeholders in the text say it.

    Args:
        model: the model.
        named: the arguments of the call, by name.
        rows: the rows of the call.

    Returns:
        The rows by the number of items, since a layer does not know more of them; None where these are not certain.
    """
    ids = named.get("input_ids")
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or len(ids) != rows:
        return {}
    found: dict[int, list[int] | None] = {}
    for name, what in _ITEMS.items():
        items = named.get(name)
        if not isinstance(items, torch.Tensor) or items.dim() < 3:
            continue
        own = _rows_of_items(ids, len(items), _placeholders(model, what))
        found[len(items)] = own if found.get(len(items), own) == own else None
    return found


def _placeholders(model: Any, what: str) -> list[int]:
    """Returns the ids of the tokens in whose place the features of images or sounds come."""
    config = getattr(model, "config", None)
    values = (getattr(config, f"{what}_token_{suffix}", None) for suffix in ("id", "index"))
    return [value for value in values if isinstance(value, int)]


def _rows_of_items(ids: torch.Tensor, items: int, placeholders: list[int]) -> list[int] | None:
    """Returns the row of each item: one in each row, or as many as a row has room for, where all are of one size."""
    in_row = torch.isin(ids, torch.tensor(placeholders, device=ids.device)).sum(1).tolist()
    if not all(in_row) or len(in_row) != items:
        size, rest = divmod(sum(in_row), items)
        if rest or not size or any(number % size for number in in_row):
            return None
        in_row = [number // size for number in in_row]
    else:
        in_row = [1] * items
    return [row for row, number in enumerate(in_row) for _ in range(number)]


def expansion(model: Any, named: Mapping[str, Any]) -> int:
    """Returns how often `generate` repeats each row, one after the other; guidance may repeat the whole batch instead.

    Args:
        model: the model.
        named: the arguments of `generate`.
    """
    given = next((value for value in named.values() if isinstance(value, GenerationConfig)), None)
    configs = given, getattr(model, "generation_config", None)
    numbers = []
    for name in ("num_beams", "num_return_sequences"):
        values = (named.get(name), *(getattr(config, name, None) for config in configs))
        numbers.append(next((value for value in values if value is not None), 1))
    return max(numbers)
