"""What transformers' caches hold, and how to follow what happens to it.

Whatever a cache does to its rows, it does to each of its layers. One of them, or a cache without layers, gets a subclass
of its own class, which tells a follower of the same, and of whatever is written into it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import Cache


ON_CACHE = "para_vectors"
"""The attribute in which a cache, and the layer of it that is followed, have the follower."""


class Follower(Protocol):
    """What follows a cache.

    Attributes:
        written: whether something wrote into the cache.
        lost: whether the cache dropped something.
    """

    written: bool
    lost: bool

    def select(self, index: Any, times: int = 1) -> None:
        """Takes the rows that an index names, each of them so many times, as the cache does."""


def follow(carrier: Any) -> None:
    """Lets a cache, or a layer of one, tell the follower that it has in `ON_CACHE` what happens to it."""
    kind: Any = type(carrier)
    if not isinstance(carrier, (torch.Tensor, list, tuple)) and not hasattr(kind, "followed"):
        carrier.__class__ = _following(kind)


@functools.cache
def _following(kind: type) -> type:
    """Returns the subclass of a class of caches, or of their layers, that tells the vectors what happens to them."""
    told = {name: note for name, note in _NOTES.items() if hasattr(kind, name)}
    told.update({name: _write for name in dir(kind) if name.startswith(("update", "set_"))})  # `set_` is MiniMax's
    methods = {name: _with_note(getattr(kind, name), note) for name, note in told.items()}
    # transformers enters each class of layers that has a `_layer_type` of its own in its tables.
    body = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "followed": kind, "_layer_type": None}
    following = type(kind.__name__, (kind,), {**body, "__reduce_ex__": _reduced, **methods})
    del following._layer_type  # type: ignore[attr-defined]
    return following


def _reduced(carrier: Any, protocol: Any) -> Any:
    return _unpickled, (type(carrier).followed,), carrier.__dict__


def _unpickled(kind: type) -> Any:
    following: Any = _following(kind)
    return following.__new__(following)


def _with_note(method: Callable[..., Any], note: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def following(self: Any, *args: Any, **kwargs: Any) -> Any:
        kept = getattr(self, ON_CACHE, None)
        if kept is None:
            return method(self, *args, **kwargs)
        return note(kept, self, method, *args, **kwargs)

    return following


def _write(kept: Follower, carrier: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kept.written = True
    return method(carrier, *args, **kwargs)


def _reset(kept: Follower, carrier: Any, method: Callable[..., Any]) -> None:
    kept.lost = True
    method(carrier)


def _crop(kept: Follower, carrier: Any, method: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    before, amount = length_of(carrier), next(iter((*args, *kwargs.values())), 0)
    method(carrier, *args, **kwargs)
    # What was cropped is read off the length, which some layers do not count, or do not correct.
    kept.lost = kept.lost or (amount < 0 and before == length_of(carrier))


def _select(kept: Follower, carrier: Any, method: Callable[..., Any], index: Any) -> None:
    method(carrier, index)
    kept.select(index)


def _repeat(kept: Follower, carrier: Any, method: Callable[..., Any], repeats: int) -> None:
    method(carrier, repeats)
    kept.select(slice(None), repeats)


_NOTES: dict[str, Callable[..., Any]] = {
    "reset": _reset,
    "crop": _crop,
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
}


def holds_tokens(cache: Any) -> bool:
    """Whether a cache holds the keys, values or states of some tokens, also those that another model computed."""
    if isinstance(cache, Cache):
        linear = getattr(cache, "linear_cache", ())  # MiniMax
        return any(holds(layer) for layer in layers_of(cache)) or any(len(state) for state in linear)
    seen = getattr(cache, "seqlen_offset", None)  # xLSTM
    return len(cache) > 0 if seen is None else bool(seen > 0)


def holder(cache: Any) -> Any:
    """Returns what carries the attributes of a cache: of a list of states, its first tensor."""
    return cache[0] if isinstance(cache, (list, tuple)) and cache else cache


def layers_of(cache: Any) -> list[Any]:
    """Returns the layers of a cache, those of the cross-attention last."""
    if hasattr(cache, "cross_attention_cache"):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return getattr(cache, "layers", [])


def holds(layer: Any) -> bool:
    """Whether a layer of a cache holds anything."""
    states = getattr(layer, "has_previous_state", None)
    return bool(states and any(states.values())) or (length_of(layer) or 0) > 0


def length_of(layer: Any) -> Any:
    count = getattr(layer, "get_seq_length", None)
    return None if count is None else count()
