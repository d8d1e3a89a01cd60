"""The state of PARA during one call, separate for each thread.

Data that is needed after the call is stored on the cache that it filled, see `caches`.
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
"""Returns the distinct `prompt_end` values of some adapters."""


class Step(Protocol):
    """The interface of a step of continuous batching, see `packed.PackedStep`."""

    def open(self, arguments: Arguments, adapters: tuple[str, ...], ends_of: EndsOf, before: Any) -> Call:
        """Returns the step's call."""

    def prompts_in(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states of the prompts that begin in this step."""

    def with_kept(self, name: str, made: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a layer's vectors for all requests, both new and stored."""


@dataclass
class Call:
    """One call of the model, as used by its target layers.

    Attributes:
        arguments: the arguments of the call.
        adapters: the names of the active adapters.
        rows: the adapter of each row of a mixed batch; None if all rows use the active adapters.
        prompts: `VectorGenerator.prompt_end` -> the prompt.
        batch: the number of rows; None if unknown.
        tokens: the number of tokens per row; None if unknown.
        vectors: layer name -> l, (batch, sequences, outputs), or None if the layer is not scaled. They are added
            during the call, or come from the cache.
        made: (block name, adapter) -> the vectors of the adapter's targets in the block; adapters of a mixed batch
            that are computed together share one dictionary.
        segments: the sequence of each token in a packed batch, (batch, tokens); else None.
        memory: the encoder's output, which the decoder of an encoder-decoder model pools.
        from_cache: whether the vectors were made by an earlier call.
        has_no_rows: whether only a vision or audio tower is called, whose inputs are not the rows of a mixed batch.
        step: the step of continuous batching, if the row holds the tokens of many requests.
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
        """The number of tokens of all rows; None if unknown."""
        return None if self.batch is None or self.tokens is None else self.batch * self.tokens

    def without_vectors(self) -> Call:
        """Returns the same call without its vectors, which checkpointing computes again, with gradients."""
        return self if self.from_cache else replace(self, vectors={}, made={})


@dataclass
class Text:
    """A text that is passed in full by each call without a cache, while `generate` appends tokens to it.

    Attributes:
        prompt: the ids at its beginning, (batch, tokens).
        expected: the number of tokens of its next call.
    """

    prompt: torch.Tensor
    expected: int

    def begins(self, input_ids: torch.Tensor) -> bool:
        """Returns whether each row begins with the prompt, whose rows may have been repeated."""
        own = self.prompt.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.prompt), 0)
        return torch.equal(input_ids[:, : own.shape[1]], own)  # also of different shapes


@dataclass
class Generation:
    """A running `generate`.

    Attributes:
        length: the number of tokens of its prompt, including those in a cache; None before the first call if it starts
            without ids, and for encoder-decoder models.
        input_ids: the prompt's ids, (batch, length), which identify its calls among others made at the same time.
        prompt_mask: the prompt as given by the caller, bool (batch, length).
        drafts: whether it drafts tokens for the `generate` of another model.
        expansion: how often it repeats each row.
        others: other texts that its logits processors continue, such as the negative prompt of guidance.
        identifier: a unique id, also across processes.
    """

    length: int | None = None
    input_ids: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    drafts: bool = False
    expansion: int = 1
    others: list[Text] = field(default_factory=list)
    identifier: str = field(default_factory=lambda: uuid.uuid4().hex)

    def prompt_of(self, input_ids: torch.Tensor | None, tokens: int) -> tuple[int | None, bool]:
        """Returns the prompt's length for a call that has no cache or fills one, and whether it is this prompt.

        Args:
            input_ids: the ids of the call.
            tokens: the number of tokens per row.

        Returns:
            None and False if the call has a different text, all of which is prompt.
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
        """Returns the caller's prompt_mask from a token slot on. The mask may omit tokens in the cache."""
        if self.prompt_mask is None or self.length is None:
            return None
        return self.prompt_mask[:, max(slot - self.length + self.prompt_mask.shape[1], 0) :]


class ParaState(threading.local):
    """The state of the current thread for one adapted model.

    Attributes:
        call: the running call of the model, which the target layers read.
        owner: the module that was called; its submodules run within the same call.
        generation: the running `generate`.
        rows: the adapter of each row of a mixed batch, as given by the caller.
        measuring: whether the model runs on dummy rows, without its adapters.
        step: the running step of continuous batching.
        step_before: the previous step.
    """

    call: Call | None = None
    owner: Any = None
    generation: Generation | None = None
    rows: tuple[str, ...] | None = None
    measuring: bool = False
    step: Step | None = None
    step_before: Step | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # the state of running calls is not copied

    @contextmanager
    def using(self, call: Call) -> Iterator[None]:
        """Makes a call the current one within the context."""
        before, self.call = self.call, call
        try:
            yield
        finally:
            self.call = before

    @contextmanager
    def generating(self, generation: Generation) -> Iterator[None]:
        """Sets the running `generate` of the calls within the context."""
        before, self.generation = self.generation, generation
        try:
            yield
        finally:
            self.generation = before

    @contextmanager
    def mixing(self, rows: tuple[str, ...]) -> Iterator[None]:
        """Sets the adapter of each row of the calls within the context."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    @contextmanager
    def decoding(self, step: Step) -> Iterator[None]:
        """Sets the step of continuous batching of the call within the context."""
        self.step = step
        try:
            yield
        finally:
            self.step, self.step_before = None, step
