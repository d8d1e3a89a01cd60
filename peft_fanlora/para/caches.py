"""What transformers' caches contain, and how changes to a cache are observed.

A cache applies each row operation to all of its layers. One of the layers, or a cache without layers, gets a subclass
of its own class that reports row operations and writes to a `Follower`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from transformers import Cache


ON_CACHE = "para_vectors"
"""The attribute that holds the follower, on a cache and on its observed layer."""


class Follower(Protocol):
    """Receives what happens to a cache.

    Attributes:
        written: whether the cache was written to.
        lost: whether the cache dropped tokens.
    """

    written: bool
    lost: bool

    def select(self, index: Any, times: int = 1) -> None:
        """Selects rows by an index and repeats each of them `times` times, as the cache does."""


def follow(carrier: Any) -> None:
    """Makes a cache, or one of its layers, report changes to the follower in its attribute `ON_CACHE`."""
    kind: Any = type(carrier)
    if not isinstance(carrier, (torch.Tensor, list, tuple)) and not hasattr(kind, "followed"):
        carrier.__class__ = _following(kind)


@functools.cache
def _following(kind: type) -> type:
    """Returns a subclass of a class of caches, or of cache layers, that reports changes to the follower."""
    told = {name: note for name, note in _NOTES.items() if hasattr(kind, name)}
    told.update({name: _write for name in dir(kind) if name.startswith(("update", "set_"))})  # `set_` is MiniMax's
    methods = {name: _with_note(getattr(kind, name), note) for name, note in told.items()}
    # transformers registers every cache layer class that defines `_layer_type` itself.
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
    # Cropped tokens show in the length, but some layers do not count their tokens or do not update the count.
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
    """Returns whether a cache holds keys, values or states of any tokens, including those of another model."""
    if isinstance(cache, Cache):
        linear = getattr(cache, "linear_cache", ())  # MiniMax
        return any(holds(layer) for layer in layers_of(cache)) or any(len(state) for state in linear)
    seen = getattr(cache, "seqlen_offset", None)  # xLSTM
    return len(cache) > 0 if seen is None else bool(seen > 0)


def holder(cache: Any) -> Any:
    """Returns the object that carries the attributes of a cache: for a list of states its first tensor."""
    return cache[0] if isinstance(cache, (list, tuple)) and cache else cache


def layers_of(cache: Any) -> list[Any]:
    """Returns the layers of a cache, cross-attention layers last."""
    if hasattr(cache, "cross_attention_cache"):
        return [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    return getattr(cache, "layers", [])


def holds(layer: Any) -> bool:
    """Returns whether a layer of a cache holds any tokens."""
    states = getattr(layer, "has_previous_state", None)
    return bool(states and any(states.values())) or (length_of(layer) or 0) > 0


def length_of(layer: Any) -> Any:
    count = getattr(layer, "get_seq_length", None)
    return None if count is None else count()
