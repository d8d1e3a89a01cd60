"""The adjusting vectors of the running requests: made when a prompt passes, read at every later step; needs no vLLM.

Each layer of the engine has a table with one row for each slot. A step tells which slot each of its tokens has, and the
prompts that begin in it. The layer that a block's generator reads from makes the vectors of its block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..para.core.generator import VectorGenerator
from .slots import Slots


class ScaledLayer:
    """A linear layer of the engine whose outputs can be scaled.

    Its table covers the outputs that some adapter scales, and grows with the adapters.

    Attributes:
        name: its name in the engine's model.
        start: the first output that the table covers.
        table: the vector of each slot, float32 (slots, covered outputs); ones where nothing is scaled.
        users: how many running requests scale this layer.
        written: the slots whose row is not ones.
    """

    def __init__(self, name: str, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.start = 0
        self.table = torch.ones(num_slots, 0, dtype=torch.float32, device=device)
        self.users = 0
        self.written: set[int] = set()

    @property
    def stop(self) -> int:
        """The output after the last one that the table covers."""
        return self.start + self.table.shape[1]

    def cover(self, start: int, stop: int) -> None:
        """Lets the table cover the outputs from `start` to `stop`, and those between them and what it covers."""
        if not self.table.shape[1]:
            self.start = start
        lower, upper = min(start, self.start), max(stop, self.stop)
        if upper - lower > self.table.shape[1]:
            table = self.table.new_ones(len(self.table), upper - lower)
            table[:, self.start - lower : self.stop - lower] = self.table
            self.start, self.table = lower, table

    def write(self, slots: Sequence[int], vectors: torch.Tensor, start: int) -> None:
        """Puts vectors, (slots, outputs), for the outputs from `start` on, into the rows of some slots."""
        rows = torch.tensor(slots, device=self.table.device)
        if vectors.shape[1] < self.table.shape[1]:
            self.table[rows] = 1.0
        self.table[rows, start - self.start : start - self.start + vectors.shape[1]] = vectors.to(self.table.dtype)
        self.written.update(slots)

    def clear(self, slot: int) -> None:
        """Makes a row ones again, where another request left its vector."""
        if slot in self.written:
            self.table[slot] = 1.0
            self.written.discard(slot)


class Scaled(NamedTuple):
    """What a target of a generator scales: a layer's outputs from `start` on."""

    layer: ScaledLayer
    start: int


@dataclass(frozen=True, eq=False)
class Block:
    """One Transformer block of a tenant.

    Attributes:
        first: the layer whose input the generator reads.
        generator: makes the vectors of all layers.
        targets: what each of the generator's targets scales.
        stack_key: what generators that are computed together have in common.
    """

    first: ScaledLayer
    generator: VectorGenerator
    targets: dict[str, Scaled]
    stack_key: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack_key", (self.generator.stack_key, tuple(self.targets.values())))


@dataclass(frozen=True, eq=False)
class Tenant:
    """A PARA adapter, ready to serve.

    Attributes:
        blocks: its generators.
        prompt_end: the token ids with which its prompts end, if it looks for them.
        layers: all layers that it scales.
    """

    blocks: Sequence[Block]
    prompt_end: tuple[int, ...] | None = None
    layers: frozenset[ScaledLayer] = field(init=False)

    def __post_init__(self) -> None:
        layers = frozenset(layer for block in self.blocks for layer, _ in block.targets.values())
        object.__setattr__(self, "layers", layers)


@dataclass(frozen=True)
class Row:
    """One request of a step.

    Attributes:
        request: its id.
        tenant: its adapter; None for the base model and for LoRA.
        num_tokens: how many of its tokens the step computes.
        num_prompt_tokens: how many tokens make its vectors, where they begin in this step; otherwise 0.
    """

    request: str
    tenant: Tenant | None
    num_tokens: int
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt that begins in the step: where it stands among the step's tokens, and where its vectors go."""

    slot: int
    start: int
    length: int


class Vectors:
    """The vectors of all running requests, and what the current step needs of them.

    Args:
        layers: the layers that can be scaled.
        max_requests: how many requests may run at the same time.
        max_tokens: how many tokens a step may have.
        device: where the engine computes.
    """

    def __init__(
        self, layers: Iterable[ScaledLayer], max_requests: int, max_tokens: int, device: torch.device | str = "cpu"
    ) -> None:
        self.layers = list(layers)
        self.slots = Slots(max_requests)
        self.slot_of_token = torch.zeros(max_tokens, dtype=torch.long, device=device)
        self._owners: dict[int, Tenant] = {}
        self._stacks: dict[ScaledLayer, list[tuple[list[Prompt], list[Block]]]] = {}
        self._scaled = self._awaited = 0

    def begin(self, rows: Sequence[Row]) -> None:
        """Begins a step: gives slots to the requests whose prompts begin in it, and a slot to each of its tokens.

        Args:
            rows: the requests of the step, in the order of its tokens.

        Raises:
            RuntimeError: a prompt is not computed whole in this step, a request goes on that has no vectors, or the last
                step left out a layer.
        """
        self._check_last_step()
        self._stacks = {}
        slots, prompts, start = [], [], 0
        for row in rows:
            if row.tenant is None:
                slot = 0
            elif row.num_prompt_tokens:
                if row.num_tokens < row.num_prompt_tokens:
                    raise RuntimeError(
                        f"{row.num_tokens} of the {row.num_prompt_tokens} prompt tokens of {row.request!r} were scheduled: "
                        "PARA's vectors need the whole prompt in one step, and vLLM's scheduler no longer asks for that."
                    )
                slot = self._assign(row.request, row.tenant)
                prompts.append((row.tenant, Prompt(slot, start, row.num_prompt_tokens)))
            else:
                slot = self.slots.of(row.request)
            slots.append(slot)
            start += row.num_tokens
        if any(slots) or self._owners:
            counts = torch.tensor([row.num_tokens for row in rows])
            self.slot_of_token[:start] = torch.repeat_interleave(torch.tensor(slots), counts)
        if prompts:
            self._stack(prompts)
        self._scaled, self._awaited = 0, sum(layer.users > 0 for layer in self.layers)

    def begin_without_requests(self) -> None:
        """Begins a step that serves nobody, such as a warm-up."""
        self._stacks = {}
        self._awaited = 0
        self.slot_of_token.zero_()

    def release(self, requests: Iterable[str]) -> None:
        """Frees the slots of requests that have ended or were preempted, which makes their vectors again."""
        for request in requests:
            slot = self.slots.release(request)
            if slot is not None:
                self._disown(slot)

    def _assign(self, request: str, tenant: Tenant) -> int:
        slot = self.slots.take(request)
        self._disown(slot)
        self._owners[slot] = tenant
        for layer in tenant.layers:
            layer.users += 1
        for layer in self.layers:
            if layer not in tenant.layers:
                layer.clear(slot)
        return slot

    def _disown(self, slot: int) -> None:
        tenant = self._owners.pop(slot, None)
        for layer in tenant.layers if tenant is not None else ():
            layer.users -= 1

    def _stack(self, prompts: Sequence[tuple[Tenant, Prompt]]) -> None:
        """Sorts the prompts' generators by the layer where they run, into stacks that are computed together.

        Prompts of a stack are padded to the longest; their lengths differ by less than a factor of two, so that a step of
        one long and many short prompts does not take the memory of as many long ones.
        """
        stacks: dict[ScaledLayer, dict[Any, tuple[list[Prompt], list[Block]]]] = defaultdict(dict)
        for tenant, prompt in prompts:
            for block in tenant.blocks:
                key = block.stack_key, prompt.length.bit_length()
                members, blocks = stacks[block.first].setdefault(key, ([], []))
                members.append(prompt)
                blocks.append(block)
        self._stacks = {layer: list(of_layer.values()) for layer, of_layer in stacks.items()}

    def run(self, layer: ScaledLayer, inputs: torch.Tensor, outputs: torch.Tensor) -> None:
        """Does what a layer needs after it ran: makes the vectors that read its inputs, and scales its outputs in place."""
        self.make(layer, inputs)
        self.scale_(layer, outputs)

    def make(self, layer: ScaledLayer, inputs: torch.Tensor) -> None:
        """Makes the vectors of the generators that read a layer's inputs, and writes them into the tables.

        Args:
            layer: the layer.
            inputs: its inputs in this step, (…, tokens, d).
        """
        for prompts, blocks in self._stacks.pop(layer, ()):
            hidden, mask = gather(inputs.reshape(-1, inputs.shape[-1]), prompts)
            made = VectorGenerator.batched([block.generator for block in blocks], hidden, mask)
            slots = [prompt.slot for prompt in prompts]
            for target, vectors in made.items():
                layer, start = blocks[0].targets[target]
                layer.write(slots, vectors[:, 0], start)

    def scale_(self, layer: ScaledLayer, outputs: torch.Tensor) -> None:
        """Multiplies a layer's outputs, (…, tokens, outputs), by the vectors of their tokens, in place."""
        if layer.users:
            self._scaled += 1
            covered = outputs[..., layer.start : layer.stop]
            covered.mul_(layer.table.index_select(0, self.slot_of_token[: outputs.shape[-2]]))

    def _check_last_step(self) -> None:
        """Raises where the engine left out a layer that some request scales: its answer would be wrong."""
        if self._stacks or self._scaled < self._awaited:
            which = next((f" ({layer.name!r} made no vectors)" for layer in self._stacks), "")
            raise RuntimeError(
                f"The last step scaled {self._scaled} of {self._awaited} layers{which}: the engine computes them in a way "
                "that PARA's hooks do not see."
            )


def gather(tokens: torch.Tensor, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the hidden states of some prompts, padded to the longest, and which of them are the prompt.

    Args:
        tokens: the hidden states of the step's tokens, (tokens, d).
        prompts: where the prompts are.

    Returns:
        (prompts, longest, d), and bool (prompts, 1, longest), as `VectorGenerator` takes them.
    """
    starts = [prompt.start for prompt in prompts]
    lengths = [prompt.length for prompt in prompts]
    longest = max(lengths)
    if min(lengths) == longest and starts == [starts[0] + longest * index for index in range(len(starts))]:
        hidden = tokens[starts[0] : starts[0] + longest * len(starts)].view(len(starts), longest, -1)
        return hidden, torch.ones(len(starts), 1, longest, dtype=torch.bool, device=tokens.device)
    place = torch.arange(longest)
    mask = place < torch.tensor(lengths).unsqueeze(1)
    index = (torch.tensor(starts).unsqueeze(1) + place).masked_fill(~mask, 0).to(tokens.device)
    return tokens[index], mask.unsqueeze(1).to(tokens.device)
