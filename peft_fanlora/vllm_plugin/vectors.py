"""The vectors of the running requests, generated in the prefill step and read in decoding steps; does not import vLLM.

Each layer has a table with one row per slot. For each step, `Vectors.begin` sets the slot of each token and the
prompts to generate vectors for. The vectors of a block are generated at its first target, whose inputs the generator
reads.
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
    """A linear layer of vLLM's model with a table of vectors.

    The table covers a range of the outputs, which grows when an adapter that scales further outputs is loaded.

    Attributes:
        name: name of the layer in vLLM's model.
        start: first output that the table covers.
        table: the vector of each slot, float32 (slots, covered outputs); ones where nothing is scaled.
        users: number of running requests that scale this layer.
        written: slots whose row may differ from ones.
    """

    def __init__(self, name: str, num_slots: int, device: torch.device | str = "cpu") -> None:
        self.name = name
        self.start = 0
        self.table = torch.ones(num_slots, 0, dtype=torch.float32, device=device)
        self.users = 0
        self.written: set[int] = set()

    @property
    def stop(self) -> int:
        """The end (exclusive) of the outputs that the table covers."""
        return self.start + self.table.shape[1]

    def cover(self, start: int, stop: int) -> None:
        """Extends the table to include the outputs from `start` to `stop` (exclusive), filled with ones."""
        if not self.table.shape[1]:
            self.start = start
        lower, upper = min(start, self.start), max(stop, self.stop)
        if upper - lower > self.table.shape[1]:
            table = self.table.new_ones(len(self.table), upper - lower)
            table[:, self.start - lower : self.stop - lower] = self.table
            self.start, self.table = lower, table

    def write(self, slots: Sequence[int], vectors: torch.Tensor, start: int) -> None:
        """Writes vectors, (slots, outputs), to the rows of the given slots, for the outputs from `start` on."""
        rows = torch.tensor(slots, device=self.table.device)
        if vectors.shape[1] < self.table.shape[1]:
            self.table[rows] = 1.0
        self.table[rows, start - self.start : start - self.start + vectors.shape[1]] = vectors.to(self.table.dtype)
        self.written.update(slots)

    def clear(self, slot: int) -> None:
        """Resets the row of a slot to ones, if it was written."""
        if slot in self.written:
            self.table[slot] = 1.0
            self.written.discard(slot)


class Scaled(NamedTuple):
    """The outputs that a target of a generator scales: those of `layer` from `start` on."""

    layer: ScaledLayer
    start: int


@dataclass(frozen=True, eq=False)
class Block:
    """The generator of one Transformer block of an adapter.

    Attributes:
        first: the layer whose inputs the generator reads.
        generator: the vector generator of the block.
        targets: target name -> outputs that it scales.
        stack_key: equal for generators that can be computed as one batch.
    """

    first: ScaledLayer
    generator: VectorGenerator
    targets: dict[str, Scaled]
    stack_key: Any = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "stack_key", (self.generator.stack_key, tuple(self.targets.values())))


@dataclass(frozen=True, eq=False)
class Tenant:
    """A loaded PARA adapter.

    Attributes:
        blocks: its generators.
        prompt_end: token ids that end its prompts; None if the whole prompt of a request is used.
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
        request: the request id.
        tenant: its PARA adapter; None for the base model and for LoRA.
        num_tokens: number of its tokens in the step.
        num_prompt_tokens: number of tokens that are pooled for its vectors; 0 if its prompt is not in this step.
    """

    request: str
    tenant: Tenant | None
    num_tokens: int
    num_prompt_tokens: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt in the current step.

    Attributes:
        slot: slot of the request, to which its vectors are written.
        start: index of its first token among the tokens of the step.
        length: number of its tokens that are pooled.
    """

    slot: int
    start: int
    length: int


class Vectors:
    """The vectors of all running requests, and the state of the current step.

    Args:
        layers: the layers that can be scaled.
        max_requests: maximum number of running requests.
        max_tokens: maximum number of tokens in a step.
        device: device of the engine.
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
        """Begins a step: assigns slots to requests whose prompt is in the step, and sets the slot of each token.

        Args:
            rows: the requests of the step, in the order of its tokens.

        Raises:
            RuntimeError: the step has only a part of a prompt, a decoding request has no vectors, or the previous step
                did not scale all layers.
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
                        f"{row.num_tokens} of the {row.num_prompt_tokens} prompt tokens of {row.request!r} were "
                        "scheduled, but PARA needs the whole prompt in one step: use the tested version of vLLM, and "
                        "report this."
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
        """Begins a step without requests, such as a warm-up."""
        self._stacks = {}
        self._awaited = 0
        self.slot_of_token.zero_()

    def release(self, requests: Iterable[str]) -> None:
        """Frees the slots of finished and preempted requests. A preempted request recomputes its vectors."""
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
        """Groups the generators of the prompts by the layer where they run, into stacks computed as one batch.

        The prompts of a stack are padded to the longest one. Their lengths differ by less than a factor of two, which
        limits the memory of a step with one long and many short prompts.
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
        """Generates the vectors that depend on a layer's inputs, and scales its outputs in place."""
        self.make(layer, inputs)
        self.scale_(layer, outputs)

    def make(self, layer: ScaledLayer, inputs: torch.Tensor) -> None:
        """Runs the generators that read a layer's inputs, (…, tokens, d), and writes their vectors to the tables."""
        for prompts, blocks in self._stacks.pop(layer, ()):
            hidden, mask = gather(inputs.reshape(-1, inputs.shape[-1]), prompts)
            made = VectorGenerator.batched([block.generator for block in blocks], hidden, mask)
            slots = [prompt.slot for prompt in prompts]
            for target, vectors in made.items():
                layer, start = blocks[0].targets[target]
                layer.write(slots, vectors[:, 0], start)

    def scale_(self, layer: ScaledLayer, outputs: torch.Tensor) -> None:
        """Multiplies a layer's outputs, (…, tokens, outputs), in place by the vectors of the tokens' slots."""
        if layer.users:
            self._scaled += 1
            covered = outputs[..., layer.start : layer.stop]
            covered.mul_(layer.table.index_select(0, self.slot_of_token[: outputs.shape[-2]]))

    def _check_last_step(self) -> None:
        """Raises a `RuntimeError` if the previous step did not scale all layers, since its outputs would be wrong."""
        if self._stacks or self._scaled < self._awaited:
            which = next((f" (the generators at {layer.name!r} did not run)" for layer in self._stacks), "")
            raise RuntimeError(
                f"The previous step scaled {self._scaled} of {self._awaited} layers{which}: vLLM computed the others "
                "without calling their forward hooks. Serve this model with transformers, and report this."
            )


def gather(tokens: torch.Tensor, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the hidden states of prompts, padded to the longest one, and their mask.

    Args:
        tokens: hidden states of the step's tokens, (tokens, d).
        prompts: the prompts.

    Returns:
        Hidden states (prompts, longest, d) and mask (prompts, 1, longest), bool, in the shapes of `VectorGenerator`.
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
