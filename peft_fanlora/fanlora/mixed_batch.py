"""Many tenants in one batch: each LoRA layer adds the deltas of all of them in two batched products.

PEFT runs a mixed batch as a loop over its adapters in every layer. Here the adapters of the batch are stacked, and row b
of a layer becomes y_b = W x_b + s_t B_t A_t x_b, with t the adapter of row b, by `bmm` and `baddbmm` over all the
adapters at once. PEFT's own layers compute W x, so quantised and other layers need no code of their own.

A call puts its hooks on the adapted layers and takes them off again; they act in the thread that made the call, so two
threads can run different batches on one model. What is not plain LoRA (variants, biases, embeddings, convolutions,
dropout that is switched on) takes PEFT's loop.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn import functional as F

from ..tenants import adapted_modules


BASE_ROWS = "__base__"
"""The name that PEFT gives to rows without an adapter."""

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


@dataclass(frozen=True)
class Slots:
    """How the rows of a batch are put into slots of equal size, so that each slot has one adapter.

    T adapters on n rows get slots of ⌈n/T⌉ rows: that makes fewer than 2T slots, and at most half of the places in them
    are padding, however unevenly the rows are spread over the adapters.

    Attributes:
        adapters: the adapter of each slot.
        rows: the row in each place, slot after slot; None where these are all rows in their order.
        places: the places that are no padding.
        padded: the row in each place, with a row of the same slot in the padding.
    """

    adapters: tuple[str, ...]
    rows: torch.Tensor | None = None
    places: torch.Tensor | None = None
    padded: torch.Tensor | None = None

    @classmethod
    def of(cls, names: Sequence[str], adapters: Sequence[str], device: torch.device) -> Slots:
        """Arranges the rows of `names` that belong to one of `adapters`, of which there is at least one."""
        rows_of = {name: [row for row, own in enumerate(names) if own == name] for name in adapters}
        size = -(-sum(map(len, rows_of.values())) // len(rows_of))
        slots = [
            (name, rows[start : start + size]) for name, rows in rows_of.items() for start in range(0, len(rows), size)
        ]
        in_slots = tuple(name for name, _ in slots)
        rows = [row for _, own in slots for row in own]
        padded = [row for _, own in slots for row in own + own[-1:] * (size - len(own))]
        if padded == list(range(len(names))):
            return cls(in_slots)
        places = [slot * size + place for slot, (_, own) in enumerate(slots) for place in range(len(own))]
        return cls(in_slots, *(torch.tensor(indices, device=device) for indices in (rows, places, padded)))


class AdapterStack:
    """The LoRA factors of a layer's adapters, one slot each; smaller ranks are filled up with zeros.

    Attributes:
        A: (slots, r, in), r the highest rank, times the adapter's α/r.
        B: (slots, r, out). This layout is the faster one for a single token.
    """

    def __init__(self, layer: Any, slots: Slots, num_rows: int) -> None:
        self.layer = layer
        self.slots = slots
        self.num_rows = num_rows
        factors = [_factors(layer, name) for name in slots.adapters]
        rank = max(len(A) for A, _ in factors)
        scalings = torch.tensor([layer.scaling[name] for name in slots.adapters], device=factors[0][0].device)
        A = torch.stack([_padded(A, rank) for A, _ in factors])
        self.A = A * scalings.to(A.dtype).view(-1, 1, 1)
        self.B = torch.stack([_padded(B.T, rank) for _, B in factors])

    def write(self, slot: int) -> None:
        """Copies an adapter's weights into its slot once more."""
        name = self.slots.adapters[slot]
        A, B = _factors(self.layer, name)
        self.A[slot, : len(A)] = A * self.layer.scaling[name]
        self.B[slot, : len(A)] = B.T

    def add_to(self, result: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Returns y_b + s_t B_t A_t x_b for each row b with an adapter t, in place where no gradient is asked for.

        Args:
            result: y, (rows, …, out).
            x: (rows, …, in). Either has the batch's rows, each as often as `generate` repeated it.
        """
        num_slots = len(self.slots.adapters)
        per_row = x.reshape(self.num_rows, -1, x.shape[-1])
        if self.slots.padded is not None:
            per_row = per_row[self.slots.padded]
        per_slot = per_row.reshape(num_slots, -1, x.shape[-1]).to(self.A.device, self.A.dtype)
        hidden = torch.bmm(per_slot, self.A.transpose(1, 2))

        in_place = not torch.is_grad_enabled() and result.is_contiguous()
        plain = result.dtype == hidden.dtype and result.device == hidden.device
        if self.slots.rows is None and in_place and plain and not torch.is_autocast_enabled(result.device.type):
            result.view(num_slots, -1, result.shape[-1]).baddbmm_(hidden, self.B)
            return result
        delta = torch.bmm(hidden, self.B).to(result.device, result.dtype)
        if self.slots.rows is None:
            delta = delta.view_as(result)
            return result.add_(delta) if in_place else result + delta
        target = result.reshape(self.num_rows, -1, result.shape[-1])
        delta = delta.reshape(-1, *target.shape[1:])[self.slots.places]
        if in_place:
            target.index_add_(0, self.slots.rows, delta)
            return result
        return target.index_add(0, self.slots.rows, delta).view_as(result)


class MixedBatch:
    """The adapters of one batch, stacked for every layer that they are on.

    Args:
        model: the adapted model.
        names: the adapter of each row.

    Attributes:
        stacks: the layers that compute their deltas here.
        others: the modules that PEFT's loop serves: LoRA that is not plain, and modules saved whole.
        idle: LoRA layers without any of the batch's adapters.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        self.names = names
        self.stacks: dict[nn.Module, AdapterStack] = {}
        self.others: list[nn.Module] = []
        self.idle: list[nn.Module] = []
        adapters = [name for name in dict.fromkeys(names) if name != BASE_ROWS]
        slots: dict[tuple[Any, ...], Slots] = {}
        for module in adapted_modules(model):
            is_lora = isinstance(module, LoraLayer)
            present = [name for name in adapters if _has(module, name)]
            if is_lora and not present:
                self.idle.append(module)
            elif is_lora and _is_plain(module, present):
                device = _factors(module, present[0])[0].device
                key = (device, *present)
                if key not in slots:
                    slots[key] = Slots.of(names, present, device)
                self.stacks[module] = AdapterStack(module, slots[key], len(names))
            else:
                self.others.append(module)
        self._sources = _Sources(list(self.stacks.values()))

    @property
    def has_graph(self) -> bool:
        """Whether the stacks lead gradients to the adapters' weights, for one backward pass."""
        return any(stack.A.requires_grad or stack.B.requires_grad for stack in self.stacks.values())

    def refresh(self) -> bool:
        """Copies those weights again that may have changed; returns whether that makes the stacks right."""
        return self._sources.refresh()


class _Sources:
    """What stacks were copied from, and how to tell whether that is still so.

    A frozen weight is the same as before if it is the same tensor at the same address, and nobody wrote to it by an
    operation that PyTorch counts. Trainable weights are copied at each call, because some optimizers write past that
    count. All of it is kept in flat lists: a decoding loop looks them over at each token.
    """

    def __init__(self, stacks: list[AdapterStack]) -> None:
        slots = [(stack, slot) for stack in stacks for slot in range(len(stack.slots.adapters))]
        layers: list[Any] = [stack.layer for stack, _ in slots]
        self.slots = slots
        self.names = [stack.slots.adapters[slot] for stack, slot in slots]
        self.scalings_of = [layer.scaling for layer in layers]
        self.scalings = list(map(dict.get, self.scalings_of, self.names))
        self.variants_of = [layer.lora_variant for layer in layers]
        dropouts = (layer.lora_dropout[name] for layer, name in zip(layers, self.names, strict=True))
        self.dropouts = [dropout for dropout in dropouts if not isinstance(dropout, nn.Identity)]

        self.linears_of = [part._modules for layer in layers for part in (layer.lora_A, layer.lora_B)]
        self.linear_names = [name for name in self.names for _ in range(2)]
        self.linears: list[Any] = list(map(dict.get, self.linears_of, self.linear_names))
        self.hooks = [hooks for linear in self.linears for hooks in (linear._forward_hooks, linear._forward_pre_hooks)]
        self.weights_of = [linear._parameters for linear in self.linears]
        self.weights = [weights["weight"] for weights in self.weights_of]
        self.addresses = list(map(torch.Tensor.data_ptr, self.weights))
        self.countable = not any(map(torch.Tensor.is_inference, self.weights))
        self.versions = self._versions()

    def _versions(self) -> list[int]:
        return list(map(attrgetter("_version"), self.weights)) if self.countable else []

    def refresh(self) -> bool:
        trainable = list(map(attrgetter("requires_grad"), self.weights))
        same = (
            self.countable
            and not (torch.is_grad_enabled() and any(trainable))  # their stacks need a graph
            and all(map(is_, map(dict.get, self.linears_of, self.linear_names), self.linears))
            and all(map(is_, map(dict.get, self.weights_of, repeat("weight")), self.weights))
            and list(map(torch.Tensor.data_ptr, self.weights)) == self.addresses
            and list(map(dict.get, self.scalings_of, self.names)) == self.scalings
            and not any(self.hooks)
            and not any(map(dict.__contains__, self.variants_of, self.names))
            and not any(map(attrgetter("training"), self.dropouts))
        )
        if not same:
            return False
        before, self.versions = self.versions, self._versions()
        if self.versions != before or any(trainable):
            stale = [new or old != now for new, old, now in zip(trainable, before, self.versions, strict=True)]
            with torch.no_grad():
                for (stack, slot), A_stale, B_stale in zip(self.slots, stale[::2], stale[1::2], strict=True):
                    if A_stale or B_stale:
                        stack.write(slot)
        return True


class MixedBatches:
    """The mixed batches of one adapted model.

    The stacks of the last batch are kept for the next call, as decoding loops come with the same names at each token.
    """

    def __init__(self) -> None:
        self._last: MixedBatch | None = None
        self._current = _Current()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model makes stacks of its own

    def forget(self) -> None:
        """Lets go of what the last batch left; whoever adds or removes adapters calls it."""
        self._last = None

    @contextmanager
    def running(self, model: nn.Module, names: tuple[str, ...], num_inputs: int | None) -> Iterator[None]:
        """Gives the rows of the calls inside of the context, and of this thread, each its own adapter.

        Args:
            model: the adapted model.
            names: the adapter of each row.
            num_inputs: the rows that the caller passes, where he passes them here; the model's calls may then repeat
                each row, as `generate` does for beams.
        """
        if num_inputs is not None and num_inputs != len(names):
            raise _wrong_length(names, num_inputs)
        run = _Run(self._batch(model, names), self._current, may_repeat=num_inputs is not None)
        before, self._current.run = self._current.run, run
        try:
            run.install(model)
            yield
        finally:
            run.remove()
            self._current.run = before

    def _batch(self, model: nn.Module, names: tuple[str, ...]) -> MixedBatch:
        last = self._last
        if last is not None and last.names == names and last.refresh():
            return last
        self._last = last = None
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            batch = MixedBatch(model, names)
        if not batch.has_graph:
            self._last = batch
        return batch


class _Current(threading.local):
    run: _Run | None = None


class _Run:
    """The hooks of one call; they do nothing in other threads, or while another call runs inside of this one.

    PyTorch enters a hook, and that it takes keyword arguments, one after the other: another thread that runs a layer in
    between passes fewer arguments, which is why every hook takes any.
    """

    def __init__(self, batch: MixedBatch, current: _Current, may_repeat: bool) -> None:
        self.batch = batch
        self.current = current
        self.may_repeat = may_repeat
        self.repeats = 1
        self.tokens = 1
        self.handles: list[Any] = []

    def install(self, model: nn.Module) -> None:
        self.handles.append(model.register_forward_pre_hook(self._before_model, with_kwargs=True))
        base = self._name_rows((BASE_ROWS,) * len(self.batch.names))
        for module in self.batch.others:
            own = tuple(name if _has(module, name) else BASE_ROWS for name in self.batch.names)
            self.handles.append(module.register_forward_pre_hook(self._name_rows(own), with_kwargs=True))
        for module in self.batch.idle:
            self.handles.append(module.register_forward_pre_hook(base, with_kwargs=True))
        for module, stack in self.batch.stacks.items():
            self.handles.append(module.register_forward_pre_hook(base, with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._add_deltas(stack), with_kwargs=True, prepend=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _before_model(self, module: nn.Module, *call: Any) -> None:
        """Finds out how often each row comes in this call of the model."""
        if self.current.run is not self:
            return
        args, kwargs = call
        num_rows = len(self.batch.names)
        inputs = _first_input(args, kwargs, _DECODER_INPUTS)
        found = num_rows if inputs is None else len(inputs)
        self.repeats, rest = divmod(found, num_rows)
        if rest or not (self.repeats == 1 or self.may_repeat):
            raise _wrong_length(self.batch.names, found)
        self.tokens = 1 if inputs is None or inputs.dim() < 2 else inputs.shape[1]

    def _name_rows(self, names: tuple[str, ...]) -> Callable[..., tuple[Any, Any] | None]:
        """Returns a hook that tells a layer of PEFT's the adapter of each row, or of each token in a flat batch."""
        named = {1: list(names)}

        def hook(module: nn.Module, *call: Any) -> tuple[Any, Any] | None:
            if self.current.run is not self:
                return None
            args, kwargs = call
            each = 1
            x = args[0] if args else kwargs.get("x")
            if isinstance(x, torch.Tensor) and len(x) != len(names):
                flat = x.dim() == 2 and len(x) == len(names) * self.repeats * self.tokens
                each = self.repeats * self.tokens if flat else self.repeats
            if each not in named:
                named[each] = [name for name in names for _ in range(each)]
            kwargs["adapter_names"] = named[each]
            return args, kwargs

        return hook

    def _add_deltas(self, stack: AdapterStack) -> Callable[..., torch.Tensor | None]:
        def hook(module: Any, *call: Any) -> torch.Tensor | None:
            if self.current.run is not self or module.disable_adapters:
                return None
            args, kwargs, output = call
            return stack.add_to(output, args[0] if args else kwargs["x"])

        return hook


def num_inputs(args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Returns the rows of a call's inputs; None where there are none to see."""
    inputs = _first_input(args, kwargs, _INPUTS)
    return None if inputs is None else len(inputs)


def _first_input(args: Sequence[Any], kwargs: dict[str, Any], names: Sequence[str]) -> torch.Tensor | None:
    values = (*args[:1], *(kwargs.get(name) for name in names))
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _wrong_length(names: Sequence[str], num_rows: int) -> ValueError:
    return ValueError(
        f"adapter_names has {len(names)} names, but the call has {num_rows} rows: pass one name for each row, "
        f"{BASE_ROWS!r} for those without an adapter."
    )


def _has(module: Any, name: str) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return name in module._adapters
    return name in module.lora_A or name in module.lora_embedding_A


def _factors(layer: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _padded(factor: torch.Tensor, rank: int) -> torch.Tensor:
    missing = rank - len(factor)
    return F.pad(factor, (0, 0, 0, missing)) if missing else factor


def _is_plain(layer: Any, names: Sequence[str]) -> bool:
    """Whether y = W x + s B A x is all that a layer computes for these adapters, with weights that can be copied."""
    for name in names:
        if name not in layer.lora_A or name in layer.lora_variant:
            return False
        linears = layer.lora_A[name], layer.lora_B[name]
        if not all(type(linear) is nn.Linear and linear.bias is None for linear in linears):
            return False
        if any(linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
            return False
        if any(type(linear.weight) is not nn.Parameter or linear.weight.is_meta for linear in linears):
            return False
        if not isinstance(layer.scaling[name], (int, float)):
            return False
        dropout = layer.lora_dropout[name]
        if not isinstance(dropout, nn.Identity) and dropout.training:
            return False
    return len({(factor.device, factor.dtype) for name in names for factor in _factors(layer, name)}) == 1
