"""What PARA remembers for the length of one call.

`ParaState` belongs to one adapted model; its layers and hooks share it. What is current in it is kept apart for each
thread. What outlives the call is stored on the cache that it filled, see `caches`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn


if TYPE_CHECKING:
    from .prompt import Prompt


Vectors = dict[str, torch.Tensor | None]


class Step(Protocol):
    """A step of continuous batching, as a call sees it: `packed.PackedStep`."""

    def open(self, input_ids: torch.Tensor, adapters: tuple[str, ...], state: ParaState) -> Call:
        """Opens the step's call."""

    def prompts_in(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states of the prompts that begin here."""

    def with_kept(self, name: str, made: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a layer's vectors for all requests: those made here, and those kept."""


@dataclass
class Call:
    """One call of the model, as its target layers see it.

    Attributes:
        adapters: the names of the active adapters.
        rows: the adapter of each row of a mixed batch; None where all rows use the active ones.
        prompts: the prompt for each way to end it, `VectorGenerator.prompt_end`.
        batch: how many rows the call has; None where that is unknown.
        tokens: how many tokens each row has; None where that is unknown.
        vectors: layer name -> l, (batch, sequences, outputs), or None where a layer scales nothing. They appear while
            the call runs, or come from the cache.
        made: (block name, adapter) -> the vectors of the adapter's targets in the block; one dictionary where several
            adapters of a mixed batch were made together.
        segments: the sequence of each token in a packed batch, (batch, tokens); else None.
        memory: the encoder's output, which the decoder of an encoder-decoder model pools.
        from_cache: whether the vectors were made by an earlier call.
        has_no_rows: whether it is the call of a tower alone, whose images or sounds are not the rows of a mixed batch.
        step: the step of continuous batching that the call is, whose row holds the tokens of many requests.
    """

    adapters: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    prompts: dict[tuple[int, ...] | None, Prompt] = field(default_factory=dict)
    batch: int | None = None
    tokens: int | None = None
    vectors: Vectors = field(default_factory=dict)
    made: dict[tuple[str, str], dict[str, torch.Tensor]] = field(default_factory=dict)
    segments: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    from_cache: bool = False
    has_no_rows: bool = False
    step: Step | None = None

    @property
    def num_tokens(self) -> int | None:
        """All tokens of the call; None where that is unknown."""
        return None if self.batch is None or self.tokens is None else self.batch * self.tokens

    def without_vectors(self) -> Call:
        """Returns the same call before its vectors were made: checkpointing makes them again, with gradients."""
        return self if self.from_cache else replace(self, vectors={}, made={})


@dataclass
class Text:
    """A text that calls without a cache bring from its beginning, again and again, while `generate` adds to it.

    Attributes:
        prompt: the ids that it began with, (batch, tokens).
        expected: how many tokens its next call has.
    """

    prompt: torch.Tensor
    expected: int

    def begins(self, input_ids: torch.Tensor) -> bool:
        """Whether each row begins with the prompt; each row of the prompt may have been repeated."""
        own, batch = self.prompt, input_ids.shape[0]
        if input_ids.shape[1] < own.shape[1] or batch % own.shape[0]:
            return False
        own = own.to(input_ids.device).repeat_interleave(batch // own.shape[0], 0)
        return torch.equal(input_ids[:, : own.shape[1]], own)


@dataclass
class Generation:
    """A running `generate`.

    Attributes:
        length: the tokens of its prompt, also those that a cache holds; None until its first call where it begins with
            none, and where the encoder reads it.
        input_ids: the prompt's ids, (batch, length), which tell its calls from others that are made meanwhile.
        prompt_mask: the prompt as the caller gives it, bool (batch, length).
        drafts: whether it drafts tokens for another model's `generate`.
        expansion: how often it repeats each row.
        others: the other texts that its logits processors go on with, such as the negative prompt of guidance.
        identifier: tells it from every other, also where a cache was saved meanwhile.
    """

    length: int | None = None
    input_ids: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    drafts: bool = False
    expansion: int = 1
    others: list[Text] = field(default_factory=list)
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)

    def prompt_of(self, input_ids: torch.Tensor | None, tokens: int) -> tuple[int | None, bool]:
        """Returns the prompt's length for a call that fills a cache, or has none, and whether the prompt is its own.

        Args:
            input_ids: the ids of the call.
            tokens: how many tokens each row has.

        Returns:
            None and False where the call has a text of its own, all of which is prompt.
        """
        if input_ids is not None:
            for text in self.others:
                if text.expected == tokens and text.begins(input_ids):
                    text.expected += 1
                    return text.prompt.shape[1], False
        if self.length is None:
            self.length, self.input_ids = tokens, input_ids
        if input_ids is None or self.input_ids is None or Text(self.input_ids, tokens).begins(input_ids):
            return self.length, True
        self.others.append(Text(input_ids, tokens + 1))
        return None, False

    def marked_from(self, slot: int) -> torch.Tensor | None:
        """Returns the caller's prompt_mask from a token slot on; the mask may leave out tokens that a cache holds."""
        if self.prompt_mask is None or self.length is None:
            return None
        return self.prompt_mask[:, max(slot - self.length + self.prompt_mask.shape[1], 0) :]


class _Current(threading.local):
    call: Call | None = None
    owner: Any = None
    generation: Generation | None = None
    rows: tuple[str, ...] | None = None
    measuring: bool = False
    step: Step | None = None
    step_before: Any = None


class ParaState:
    """What the layers and hooks of one adapted model share.

    Attributes:
        blocks: the adapted blocks by name.
        hooks: the hooks on the model.
        places: where the layers see the rows of a call.
    """

    def __init__(self) -> None:
        from ..serving.rows import RowPlaces

        self.identifier = uuid.uuid4().hex
        self.blocks: dict[str, Any] = {}
        self.current = _Current()
        self.hooks: Any = None
        self.places = RowPlaces()

    def __getstate__(self) -> dict[str, Any]:
        # What is running belongs to the threads of this model, not to a copy of it.
        return {name: value for name, value in self.__dict__.items() if name != "current"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.current = _Current()

    def active_adapters(self) -> tuple[str, ...]:
        """Returns the adapters that take part in a forward pass: none while they are disabled."""
        layers = (layer for block in self.blocks.values() for layer in block.layers if not layer.disable_adapters)
        return tuple(dict.fromkeys(name for layer in layers for name in layer.active_adapters))

    def prompt_ends(self, adapters: tuple[str, ...]) -> set[tuple[int, ...] | None]:
        """Returns the different ways in which the prompts of these adapters end."""
        blocks = self.blocks.values()
        return {block.generator(name).prompt_end for block in blocks for name in adapters if name in block.owners}

    def rows_of(self, module: nn.Module, x: torch.Tensor) -> Sequence[str] | None:
        """Returns the adapter of each entry of a module's input in a mixed batch; None outside of one.

        Raises:
            ValueError: it is not certain where the input has the rows.
        """
        call = self.current.call
        if call is None or call.rows is None:
            return None
        rows = len(call.rows)
        if self.places.dimension(module, x.shape, rows, call.tokens) != 0:
            raise ValueError(
                f"{type(module).__name__} saw a tensor of the shape {tuple(x.shape)} in a mixed batch of {rows} rows, so that "
                "PARA cannot tell which adapter's copy each entry takes: run the rows of each adapter in a call of their "
                "own."
            )
        return [name for name in call.rows for _ in range(len(x) // rows)]

    @contextmanager
    def using(self, call: Call) -> Iterator[None]:
        """Makes a call the current one of this thread, for as long as the context lasts."""
        before, self.current.call = self.current.call, call
        try:
            yield
        finally:
            self.current.call = before

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Tells the calls inside of the context which prompt they go on from."""
        before, self.current.generation = self.current.generation, generation
        try:
            yield
        finally:
            self.current.generation = before

    @contextmanager
    def mixing(self, rows: tuple[str, ...]) -> Iterator[None]:
        """Gives the rows of the calls inside of the context each its own adapter."""
        before, self.current.rows = self.current.rows, rows
        try:
            yield
        finally:
            self.current.rows = before

    def current_step(self) -> Step:
        """Returns the step of continuous batching that this thread runs.

        Raises:
            ValueError: nobody said which requests it has.
        """
        from ..serving.continuous_batching import FIX

        if self.current.step is None:
            raise ValueError(
                "This continuous batching does not tell PARA which request each token belongs to: take the manager that "
                f"the adapted model's own init_continuous_batching returns, or {FIX}."
            )
        return self.current.step

    @contextmanager
    def decoding(self, step: Step) -> Iterator[None]:
        """Tells the call inside of the context which request each of its tokens belongs to."""
        self.current.step = step
        try:
            yield
        finally:
            self.current.step, self.current.step_before = None, step
