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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..tenants import adapted_modules
from .stacks import AdapterStack, Slots, Sources, is_plain


BASE_ROWS = "__base__"
"""The name that PEFT gives to rows without an adapter."""

_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


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
            elif is_lora and is_plain(module, present):
                device = module.lora_A[present[0]].weight.device
                key = (device, *present)
                if key not in slots:
                    slots[key] = Slots.of(names, present, device)
                self.stacks[module] = AdapterStack(module, slots[key], len(names))
            else:
                self.others.append(module)
        self._sources = Sources(list(self.stacks.values()))

    @property
    def has_graph(self) -> bool:
        """Whether the stacks lead gradients to the adapters' weights, for one backward pass."""
        return any(stack.A.requires_grad or stack.B.requires_grad for stack in self.stacks.values())

    def refresh(self) -> bool:
        """Copies those weights again that may have changed; returns whether that makes the stacks right."""
        return self._sources.refresh()


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


def row_names(names: Any, adapters: Mapping[str, Any], training: bool) -> tuple[str, ...]:
    """Returns the adapter of each row as the caller names it, after checking that all are there.

    Raises:
        ValueError: the model is training, there is no adapter of some name, or these are no names.
    """
    if training:
        raise ValueError("adapter_names mixes adapters in inference only: call model.eval() first.")
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"adapter_names is {names!r}; pass a list with the adapter's name for each row.")
    unknown = sorted(set(names) - adapters.keys() - {BASE_ROWS})
    if unknown or not names:
        raise ValueError(
            f"adapter_names has {unknown}, but the adapters are {sorted(adapters)}, and {BASE_ROWS!r} for the base "
            "model: load the adapter first, or correct the name."
        )
    return tuple(names)


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
