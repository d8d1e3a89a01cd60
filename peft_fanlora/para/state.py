"""What PARA remembers for the length of one call, apart for each thread.

What outlives the call is stored on the cache that it filled, see `caches`.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch


if TYPE_CHECKING:
    from ..serving.call import Arguments
    from .prompt import Prompt


Vectors = dict[str, torch.Tensor | None]
PromptEnd = tuple[int, ...] | None
"""The token ids that end every prompt of an adapter, `VectorGenerator.prompt_end`."""
EndsOf = Callable[[tuple[str, ...]], set[PromptEnd]]
"""Returns the different ways in which the prompts of some adapters end."""


class Step(Protocol):
    """A step of continuous batching, as a call sees it: `packed.PackedStep`."""

    def open(self, arguments: Arguments, adapters: tuple[str, ...], ends_of: EndsOf, before: Any) -> Call:
        """Opens the step's call."""

    def prompts_in(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states of the prompts that begin here."""

    def with_kept(self, name: str, made: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a layer's vectors for all requests: those made here, and those kept."""


@dataclass
class Call:
    """One call of the model, as its target layers see it.

    Attributes:
        arguments: what the call brings.
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

    arguments: Arguments
    adapters: tuple[str, ...] = ()
    rows: tuple[str, ...] | None = None
    prompts: dict[PromptEnd, Prompt] = field(default_factory=dict)
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


class ParaState(threading.local):
    """What is current in a thread for one adapted model.

    Attributes:
        call: the running call of the model, which the target layers read.
        owner: the module whose call it is; what runs inside of it runs under it.
        generation: the running `generate`.
        rows: the adapter of each row, as the caller of a mixed batch names it.
        measuring: whether the model runs on made-up rows, without its adapters.
        step: the running step of continuous batching.
        step_before: the one before it.
    """

    call: Call | None = None
    owner: Any = None
    generation: Generation | None = None
    rows: tuple[str, ...] | None = None
    measuring: bool = False
    step: Step | None = None
    step_before: Step | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # what is running belongs to the threads of this model, not to a copy of it

    @contextmanager
    def using(self, call: Call) -> Iterator[None]:
        """Makes a call the current one, for as long as the context lasts."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Tells the calls inside of the context which prompt they continue."""
        before, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = before

    @contextmanager
    def mixing(self, rows: tuple[str, ...]) -> Iterator[None]:
        """Gives the rows of the calls inside of the context each its own adapter."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    @contextmanager
    def decoding(self, step: Step) -> Iterator[None]:
        """Tells the call inside of the context which request each of its tokens belongs to."""
        self.step = step
        try:
            yield
        finally:
            self.step, self.step_before = None, step
