"""Which adapters a call's rows have: each LoRA layer adds the deltas of all of them in two products.

PEFT runs a mixed batch as a loop over its adapters in every layer. Here the adapters of the batch are stacked, and row b
of a layer becomes y_b = W x_b + s_t B_t A_t x_b, with t the adapter of row b, by `bmm` and `baddbmm` over all the
adapters at once. PEFT's own layers compute W x, so quantised and other layers need no code of their own. Where all rows
have the same adapter, be it the active one of a call without names, the products are `mm` and `addmm` on its own weights.

Which batch runs is known to each thread alone, so two threads can run different ones on one model. What is not plain
LoRA (variants, biases, embeddings, convolutions, dropout that is switched on) takes PEFT's loop.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..tenants import BASE_ROWS, adapted_modules
from .stacks import AdapterStack, SharedAdapter, Slots, Sources, is_plain


_INPUTS = ("inputs", "input_ids", "inputs_embeds", "input_features", "input_values", "pixel_values")
_DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds")


class Batch:
    """The adapters of one batch, stacked for every layer that they are on.

    Args:
        model: the adapted model.
        names: the adapter of each row; or the active one alone, which all rows have, however many there are.

    Attributes:
        stacks: the layers that compute their deltas here. With the active adapter, the others run as PEFT's own.
        others: the modules that PEFT's loop serves, LoRA that is not plain and modules saved whole, with the adapter
            of each row.
        idle: LoRA layers without any of the batch's adapters.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] | str) -> None:
        self.names = names
        self.stacks: dict[nn.Module, AdapterStack | SharedAdapter] = {}
        self.others: dict[nn.Module, list[str]] = {}
        self.idle: list[nn.Module] = []
        if isinstance(names, str):
            self._share(model, names)
        else:
            self._stack(model, names)
        self._sources = Sources(list(self.stacks.values()))
        self._caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def _share(self, model: nn.Module, name: str) -> None:
        for module in adapted_modules(model):
            # PEFT's layers on most quantised bases compute in a `forward` of their own
            is_linear = isinstance(module, Linear) and type(module).forward is Linear.forward
            if is_linear and _is_alone(module, name) and is_plain(module, [name]) and _can_stand_in(module):
                self.stacks[module] = SharedAdapter(module, name)

    def _stack(self, model: nn.Module, names: tuple[str, ...]) -> None:
        adapters = [name for name in dict.fromkeys(names) if name != BASE_ROWS]
        slots: dict[tuple[Any, ...], Slots] = {}
        for module in adapted_modules(model):
            is_lora = isinstance(module, LoraLayer)
            present = [name for name in adapters if _has(module, name)]
            if is_lora and not present:
                self.idle.append(module)
            elif is_lora and is_plain(module, present) and _can_stand_in(module):
                if len(set(names)) == 1:
                    self.stacks[module] = SharedAdapter(module, *present)
                    continue
                device = module.lora_A[present[0]].weight.device
                key = (device, *present)
                if key not in slots:
                    slots[key] = Slots.of(names, present, device)
                self.stacks[module] = AdapterStack(module, slots[key], len(names))
            else:
                self.others[module] = [name if _has(module, name) else BASE_ROWS for name in names]

    @property
    def has_graph(self) -> bool:
        """Whether the stacks lead gradients to the adapters' weights, for one backward pass."""
        return any(stack.A.requires_grad or stack.B.requires_grad for stack in self.stacks.values())

    def refresh(self) -> bool:
        """Copies those weights again that may have changed; returns whether that makes the stacks right."""
        is_active = not isinstance(self.names, str) or all(_is_alone(layer, self.names) for layer in self.stacks)
        return is_active and self._sources.refresh()

    def goes_on(self, cache: Any, tokens: int) -> bool:
        """Whether a call is one more token of a generation that these stacks have served; remembers its cache."""
        if not hasattr(cache, "get_seq_length") or torch.is_grad_enabled():
            return False
        is_known = cache in self._caches
        self._caches.add(cache)
        return is_known and tokens == 1


class Batches:
    """The batches of one adapted model.

    The stacks of the last mixed batch, and of the last call without names, are kept for the next one, as decoding loops
    come with the same names at each token. A call that begins something new looks over all weights that they were made
    from; a further token, with a cache that these stacks have seen before, does not.

    The first batch puts a `_LayerForward` in front of the adapted layers' own `forward`, and hooks on the model and on
    what is no LoRA layer. They stay, as putting them there anew for each token would cost more than all else here, and do
    nothing unless a batch runs in the same thread. PyTorch enters a hook, and that it takes keyword arguments, one after
    the other: another thread that runs the module in between passes fewer arguments, which is why the hooks take any.
    """

    def __init__(self) -> None:
        self._last: dict[type, Batch] = {}
        self.current = _Current()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copy of the model makes stacks of its own

    def forget(self) -> None:
        """Lets go of what the last batches left; whoever adds or removes adapters calls it."""
        self._last.clear()

    def leave(self, model: nn.Module) -> None:
        """Takes the hook off a model whose adapted layers, and their hooks with them, are gone."""
        self.forget()
        for key in self._own_hooks(model):
            del model._forward_pre_hooks[key]
            del model._forward_pre_hooks_with_kwargs[key]

    @contextmanager
    def running(self, model: nn.Module, names: tuple[str, ...] | str, num_inputs: int | None = None) -> Iterator[None]:
        """Gives the rows of the calls inside of the context, and of this thread, each its own adapter.

        Args:
            model: the adapted model.
            names: the adapter of each row; or the active one, for all rows of calls that are not in a mixed batch.
            num_inputs: the rows that the caller passes, where he passes them here; the model's calls may then repeat
                each row, as `generate` does for beams.
        """
        if num_inputs is not None and num_inputs != len(names):
            raise _wrong_length(names, num_inputs)
        last = self._last.get(type(names))
        batch = self._make(model, names) if last is None or last.names != names else last
        run = _Run(batch, may_repeat=num_inputs is not None, is_checked=batch is not last)
        before, self.current.run = self.current.run, run
        try:
            yield
        finally:
            self.current.run = before

    def _make(self, model: nn.Module, names: tuple[str, ...] | str) -> Batch:
        self._last.pop(type(names), None)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad):
            batch = Batch(model, names)
        self._hook(model, batch)
        if not batch.has_graph:
            self._last[type(names)] = batch
        return batch

    def _hook(self, model: nn.Module, batch: Batch) -> None:
        for module in (model, *batch.stacks, *batch.others, *batch.idle):
            if isinstance(module, LoraLayer) and _can_stand_in(module):
                own = vars(module).get("forward")
                if own is None or own.batches is not self:
                    _LayerForward(module, self).install()
            elif not self._own_hooks(module):
                before = self._before_model if module is model else self._before
                module.register_forward_pre_hook(before, with_kwargs=True)

    def _own_hooks(self, module: nn.Module) -> list[int]:
        hooks = module._forward_pre_hooks.items()
        return [key for key, hook in hooks if getattr(hook, "__self__", None) is self]

    def _before_model(self, module: nn.Module, *call: Any) -> None:
        run = self.current.run
        if run is None:
            return
        args, kwargs = call
        run.begin_call_of_model(_first_input(args, kwargs, _DECODER_INPUTS))
        if run.is_checked or run.batch.goes_on(kwargs.get("past_key_values"), run.tokens):
            return
        if not run.batch.refresh():
            run.batch = self._make(module, run.batch.names)
        run.is_checked = True

    def _before(self, module: nn.Module, *call: Any) -> tuple[Any, Any] | None:
        run = self.current.run
        if run is None or not run.is_mixed:
            return None
        args, kwargs = call
        kwargs["adapter_names"] = run.names_for(module, args[0] if args else kwargs.get("x"))
        return args, kwargs


class _Current(threading.local):
    run: _Run | None = None


class _LayerForward:
    """Runs a LoRA layer: with the deltas of its adapters' stack where the batch has one for it, else as PEFT does.

    It stands where PyTorch looks for `forward` first. A pair of hooks could do the same, but the hooks and PEFT's own path
    for mixed batches between them cost about as much as the products of a single token.
    """

    def __init__(self, layer: Any, batches: Batches) -> None:
        self.layer = layer
        self.batches = batches

    def install(self) -> None:
        self.layer.forward = self
        self.layer._replicate_for_data_parallel = self.replicate_without_it

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        layer, run = self.layer, self.batches.current.run
        if run is None:
            return type(layer).forward(layer, *args, **kwargs)
        stack = run.batch.stacks.get(layer)
        if stack is not None and len(args) == 1 and not (kwargs or layer.disable_adapters or layer.merged_adapters):
            base = layer.base_layer
            result = base(*args)
            return stack.add_to(result.clone() if base._forward_hooks else result, args[0])
        if not run.is_mixed:
            return type(layer).forward(layer, *args, **kwargs)
        x: Any = args[0] if args else kwargs.get("x")
        kwargs["adapter_names"] = run.names_for(layer, x)
        output = type(layer).forward(layer, *args, **kwargs)
        return output if stack is None or layer.disable_adapters else stack.add_to(output, x)

    def replicate_without_it(self) -> nn.Module:
        """Makes a replica for `DataParallel`, which has the layer's attributes: with this one it would run the original."""
        replica = type(self.layer)._replicate_for_data_parallel(self.layer)
        del replica.forward, replica._replicate_for_data_parallel
        return replica


def _can_stand_in(layer: Any) -> bool:
    """Whether a layer's `forward` may be replaced: nobody else has done so, and PEFT lets the layer mix adapters."""
    own = vars(layer).get("forward")
    is_free = own is None or isinstance(own, _LayerForward)
    return is_free and type(layer)._check_forward_args is LoraLayer._check_forward_args


class _Run:
    """One call with a mixed batch.

    Args:
        batch: its adapters, stacked.
        may_repeat: whether the model's calls may repeat each row.
        is_checked: whether the stacks are known to be what the adapters' weights are now.
    """

    def __init__(self, batch: Batch, may_repeat: bool, is_checked: bool) -> None:
        self.batch = batch
        self.may_repeat = may_repeat
        self.is_mixed = not isinstance(batch.names, str)
        self.is_checked = is_checked
        self.repeats = 1
        self.tokens = 1

    def begin_call_of_model(self, inputs: torch.Tensor | None) -> None:
        """Finds out how many tokens the rows of this call of the model have, and how often each of them comes."""
        self.tokens = 1 if inputs is None or inputs.dim() < 2 else inputs.shape[1]
        if not self.is_mixed:
            return
        num_rows = len(self.batch.names)
        found = num_rows if inputs is None else len(inputs)
        self.repeats, rest = divmod(found, num_rows)
        if rest or not (self.repeats == 1 or self.may_repeat):
            raise _wrong_length(self.batch.names, found)

    def names_for(self, module: nn.Module, x: Any) -> Sequence[str]:
        """Returns what PEFT's layer is to take for the adapter of each row, or of each token in a flat batch."""
        num_rows, each = len(self.batch.names), 1
        if isinstance(x, torch.Tensor) and x.shape[0] != num_rows:
            flat = x.dim() == 2 and x.shape[0] == num_rows * self.repeats * self.tokens
            each = self.repeats * self.tokens if flat else self.repeats
        names = self.batch.others.get(module)
        if names is None:
            return _NoAdapters(num_rows * each)
        return [name for name in names for _ in range(each)]


class _NoAdapters(Sequence[str]):
    """The names of rows for which PEFT's layers have no adapter to compute; they need no more than the number."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __getitem__(self, index: Any) -> Any:
        return BASE_ROWS


def num_inputs(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
    """Returns the rows of a call's inputs; None where there are none to see."""
    inputs = _first_input(args, kwargs, _INPUTS)
    return None if inputs is None else len(inputs)


def _first_input(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> torch.Tensor | None:
    values = (*args[:1], *(kwargs.get(name) for name in names))
    return next((value for value in values if isinstance(value, torch.Tensor)), None)


def _wrong_length(names: Sequence[str], num_rows: int) -> ValueError:
    return ValueError(
        f"adapter_names has {len(names)} names, but the call has {num_rows} rows: pass one name for each row, "
        f"{BASE_ROWS!r} for those without an adapter."
    )


def _is_alone(layer: Any, name: str) -> bool:
    """Whether an adapter is the only active one of a layer."""
    return list(layer.active_adapters) == [name]


def _has(module: Any, name: str) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return name in module._adapters
    return name in module.lora_A or name in module.lora_embedding_A
