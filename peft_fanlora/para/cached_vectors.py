"""The PARA vectors of a prompt, stored on the KV cache that the prompt filled.

They are copied, pickled and deleted with the cache, and follow its row operations. Writes to the cache by anything
other than the adapted model are detected, because the vectors then no longer match its content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .caches import ON_CACHE, follow, holder, holds, layers_of, length_of
from .state import Vectors


@dataclass
class CachedVectors:
    """The vectors of a prompt and the data needed to check that a later call may use them.

    Attributes:
        model: the identifier of the model that filled the cache.
        adapters: the adapters that were active then.
        rows: the adapter of each row, in a mixed batch.
        vectors: the vectors of each layer.
        batch: the number of rows in the cache; None if unknown.
        prompt_length: the number of token slots of the prompt.
        prompt_ids: the ids in these slots, (batch, prompt_length); None if unknown.
        tokens: the number of tokens per row in the call that filled the cache.
        generation: the identifier of the `generate` that the call belonged to; None outside of `generate`.
        answer: the first token that `generate` returned for each row, (batch, 1); None if unknown.
        anchor: the index of the cache layer that carries the vectors; None if the cache has no layers.
        continued: whether tokens followed the prompt, for a cache that does not count them.
        written: whether the cache was written to since the last call of the model.
        lost: whether the cache dropped the tokens that the vectors belong to.
    """

    model: str
    adapters: tuple[str, ...]
    rows: tuple[str, ...] | None
    vectors: Vectors
    batch: int | None
    prompt_length: int
    prompt_ids: torch.Tensor | None = None
    tokens: int = 0
    generation: str | None = None
    answer: torch.Tensor | None = None
    anchor: int | None = None
    continued: bool = False
    written: bool = False
    lost: bool = False

    @staticmethod
    def of(cache: Any) -> CachedVectors | None:
        """Returns what an earlier call stored on a cache; None if there is nothing or its layers were replaced."""
        kept = getattr(holder(cache), ON_CACHE, None)
        return kept if kept is not None and getattr(kept.carrier(cache), ON_CACHE, None) is kept else None

    def keep_on(self, cache: Any, of_encoder: bool = False) -> None:
        """Stores the vectors on the cache, replacing those of an earlier prompt.

        Args:
            cache: the cache that the prompt's call filled.
            of_encoder: whether the prompt is the encoder's input, so that the vectors belong to the cross-attention.
        """
        layers = layers_of(cache)
        holding = [index for index, layer in enumerate(layers) if holds(layer)]
        if of_encoder:
            holding.reverse()
        # Prefer a layer that counts its tokens, since its length shows how far it was cropped.
        counting = [index for index in holding if hasattr(layers[index], "get_seq_length")]
        self.anchor = next(iter(counting + holding), None)
        carrier = self.carrier(cache)
        if hasattr(carrier, "__dict__"):
            setattr(holder(cache), ON_CACHE, self)
            setattr(carrier, ON_CACHE, self)
        follow(carrier)

    def carrier(self, cache: Any) -> Any:
        """Returns the layer of the cache that carries the vectors, or the cache itself."""
        layers = layers_of(cache)
        if self.anchor is None:
            return holder(cache)
        return layers[self.anchor] if self.anchor < len(layers) else None

    def length(self, cache: Any) -> Any:
        """Returns how many tokens the cache holds, as an int or a tensor; None if it does not count them."""
        return None if self.anchor is None else length_of(self.carrier(cache))

    def go_on(self, cache: Any) -> None:
        """Records that the cache was written to by a call that used these vectors."""
        self.written = False
        if not self.continued and self.length(cache) is None:
            self.continued = True

    def prompt_tokens_again(self, cached: int, ids: torch.Tensor | None) -> int:
        """Returns how many tokens of a call restore the cropped end of the prompt.

        Args:
            cached: how many tokens the cache holds.
            ids: the ids of the call.

        Raises:
            ValueError: the tokens differ from those of the prompt.
        """
        if cached >= self.prompt_length:
            return 0
        again = 0 if ids is None else min(self.prompt_length - cached, ids.shape[1])
        own = None if self.prompt_ids is None else self.prompt_ids[:, cached : cached + again]
        if ids is None or own is None or not torch.equal(own.to(ids.device), ids[:, :again]):
            raise ValueError(
                f"The cache was cropped to {cached} tokens, which is within the prompt of {self.prompt_length} tokens "
                "that its PARA vectors were made from, and this call does not continue that prompt. The vectors of a "
                "different prompt must be made from all of its tokens: start from an empty cache."
            )
        return again

    def goes_on_with(self, input_ids: torch.Tensor | None) -> bool:
        """Returns whether tokens begin with the one that `generate` returned, so that they are a further turn."""
        answer = self.answer
        return (
            answer is not None and input_ids is not None and torch.equal(input_ids[:, :1], answer.to(input_ids.device))
        )

    def select(self, index: Any, times: int = 1) -> None:
        """Selects rows by an index and repeats each of them `times` times, as the cache does."""
        rows = torch.arange(
            next((len(vector) for vector in self.vectors.values() if vector is not None), self.batch or 0)
        )
        index = rows[index.cpu() if isinstance(index, torch.Tensor) else index].repeat_interleave(times)
        self.vectors = {
            name: None if vector is None else vector[index.to(vector.device)] for name, vector in self.vectors.items()
        }
        self.rows = None if self.rows is None else tuple(self.rows[row] for row in index.tolist())
        self.prompt_ids, self.answer = (
            None if ids is None else ids[index.to(ids.device)] for ids in (self.prompt_ids, self.answer)
        )
        self.batch = None if self.batch is None else len(index)

    def check_call(self, batch: int | None, rows: tuple[str, ...] | None, adapters: tuple[str, ...]) -> None:
        """Checks that a call has the same rows and adapters as the cache.

        Raises:
            ValueError: they differ.
        """
        if batch is not None and self.batch is not None and batch != self.batch:
            raise ValueError(
                f"The cache holds the prompts of {self.batch} rows, but this call has {batch}: PARA cannot tell which "
                "prompt each row continues. Fill a new cache with the prompts of these rows."
            )
        if self.rows != rows or (rows is None and set(self.adapters) != set(adapters)):
            raise ValueError(
                f"The cache was filled with the adapters {list(self.rows or self.adapters)}, but "
                f"{list(rows or adapters)} are active now: a prompt's vectors are only valid for the adapter that "
                "made them. Start from an empty cache after switching adapters."
            )


def usable(kept: CachedVectors | None, model: str) -> CachedVectors:
    """Returns the vectors that a call with this cache uses.

    Args:
        kept: what earlier calls stored on the cache.
        model: the identifier of the model.

    Raises:
        ValueError: the cache was not filled by this model, or was changed since.
    """
    if kept is None or kept.model != model or kept.lost or kept.written:
        raise ValueError(
            "The cache holds no PARA vectors of its prompt: it was not filled by this model with its PARA adapter "
            "active, or it was changed since. Results of another model, of the base model or of a failed call cannot "
            "be reused. Start from an empty cache, with the adapter active."
        )
    return kept
