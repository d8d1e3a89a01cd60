"""Mixed-batch LoRA: all adapters of a batch in two matrix products per layer.

PEFT runs a mixed batch as a loop over its adapters in every layer. Here the adapters of the batch are stacked, and row
b of a layer becomes y_b = W x_b + s_t B_t A_t x_b, with t the adapter of row b, by `bmm` and `baddbmm` over all
adapters at once. PEFT's own layers compute W x, so quantised layers and others work as they are. If all rows have the
same adapter, such as the active one of a call without names, the products are `mm` and `addmm` on its own weights.

The current batch is stored per thread, so that threads can run different batches on one model. Adapters that are not
plain LoRA (variants, biases, embeddings, convolutions, active dropout) use PEFT's loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..serving.call import Arguments, cache_in
from ..serving.gate import CallGate
from ..serving.named_rows import NamedRows
from ..serving.rows import RowPlaces
from ..serving.tenants import BASE_ROWS, adapted_modules, wrong_length
from .homes import Homes
from .layer_forward import LayerForward, can_stand_in
from .run import CurrentRun, PackedRun, Run
from .stacks import AdapterStack, SharedAdapter, Slots, is_plain


class Batch:
    """The adapters of one batch, stacked for each layer that has them.

    Args:
        model: the adapted model.
        names: the adapter of each row; or the name of the active adapter, for any number of rows.
        places: the dimensions in which the layers see the rows.
        homes: the memory in which the adapters may be stacked; None to copy their weights.

    Attributes:
        stacks: the layers whose deltas are computed here. With the active adapter, all others run as in PEFT.
        others: the modules that use PEFT's loop (LoRA that is not plain, and `modules_to_save`) -> the adapter of each
            row.
        idle: LoRA layers without any of the batch's adapters.
        caches: the KV caches of the generations that used these stacks.
    """

    def __init__(self, model: nn.Module, names: tuple[str, ...] | str, places: RowPlaces, homes: Homes | None) -> None:
        self.names = names
        self.places = places
        self.stacks: dict[nn.Module, AdapterStack | SharedAdapter] = {}
        self.others: dict[nn.Module, list[str]] = {}
        self.idle: list[nn.Module] = []
        if isinstance(names, str):
            self._share(model, names)
        else:
            self._stack(model, names, homes)
        self.caches: weakref.WeakSet[Any] = weakref.WeakSet()

    def _share(self, model: nn.Module, name: str) -> None:
        for module in adapted_modules(model):
            # PEFT's layers for most quantised base layers have their own `forward`
            is_linear = isinstance(module, Linear) and type(module).forward is Linear.forward
            if is_linear and _is_alone(module, name) and is_plain(module, [name]) and can_stand_in(module):
                self.stacks[module] = SharedAdapter(module, name)

    def _stack(self, model: nn.Module, names: tuple[str, ...], homes: Homes | None) -> None:
        adapters = [name for name in dict.fromkeys(names) if name != BASE_ROWS]
        slots: dict[tuple[Any, ...], Slots] = {}
        for module in adapted_modules(model):
            is_lora = isinstance(module, LoraLayer)
            present = [name for name in adapters if _has(module, name)]
            if is_lora and not present:
                self.idle.append(module)
            elif is_lora and is_plain(module, present) and can_stand_in(module):
                if len(set(names)) == 1:
                    self.stacks[module] = SharedAdapter(module, *present)
                    continue
                device = module.lora_A[present[0]].weight.device
                key = (device, *present)
                if key not in slots:
                    slots[key] = Slots.of(names, present, device)
                rows_first = self.places.is_rows_first(module)
                self.stacks[module] = AdapterStack(module, slots[key], names, rows_first, homes)
            else:
                self.others[module] = [name if _has(module, name) else BASE_ROWS for name in names]

    @property
    def has_graph(self) -> bool:
        """Whether the stacks have a graph to the adapters' weights, which serves a single backward pass."""
        return any(stack.A.requires_grad or stack.B.requires_grad for stack in self.stacks.values())

    def has_served(self, cache: Any) -> bool:
        """Returns whether a call with this cache continues a generation that used these stacks."""
        return hasattr(cache, "get_seq_length") and cache in self.caches and not torch.is_grad_enabled()


class Batches:
    """The batches of one adapted model.

    A batch is stacked again for each new generation or call, since changes of weights cannot be detected. The stacks
    of the last mixed batch, and of the last call without names, are reused for further tokens of the same generations,
    which are recognised by their KV caches.

    The first batch installs a `LayerForward` in front of the `forward` of the adapted layers, and hooks on the model
    and on modules that are not LoRA layers. They are permanent, since installing them for each token would cost more
    than all other overhead, and do nothing unless a batch runs in the same thread.

    Args:
        gate: the gate that the calls of the model pass.
        homes: the memory that stacks share with the adapters.
    """

    def __init__(self, gate: CallGate, homes: Homes) -> None:
        self._gate = gate
        self._homes = homes
        self._last: dict[type, Batch] = {}
        self._places = RowPlaces()
        self.current = CurrentRun()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._gate, self._homes)  # a copy of the model builds its own stacks

    def forget(self) -> None:
        """Drops the stored batches, at each change of the adapters, whose weights get memory of their own again."""
        self._last.clear()
        self._homes.give_back()

    def leave(self, model: nn.Module) -> None:
        """Removes the hooks from a model whose adapted layers were removed."""
        self.forget()
        for key in self._own_hooks(model._forward_pre_hooks):
            del model._forward_pre_hooks[key]
            del model._forward_pre_hooks_with_kwargs[key]
        for key in self._own_hooks(model._forward_hooks):
            del model._forward_hooks[key]

    @contextmanager
    def running(
        self, model: nn.Module, names: tuple[str, ...] | str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        """Applies the adapter of each row to the calls of this thread within the context.

        Args:
            model: the adapted model.
            names: the adapter of each row; or the active one, for calls that are not mixed batches.
            args: the positional arguments of the model's forward or of `generate`, as far as they are known.
            kwargs: the keyword arguments.

        Raises:
            ValueError: the number of names does not match the number of rows.
        """
        given = Arguments.of(model, args, kwargs)
        if isinstance(names, tuple) and given.given_rows not in (None, len(names)):
            raise wrong_length(names, given.given_rows)
        last = self._last.get(type(names))
        continues = last is not None and last.names == names and last.has_served(given.cache)
        batch = last if continues and last is not None else self._make(model, names, given)
        run = Run(batch, model, given, is_checked=not continues)
        before, self.current.run = self.current.run, run
        try:
            yield
        finally:
            self.current.run = before

    @contextmanager
    def decoding(self, model: nn.Module, names: tuple[str, ...], begins: bool) -> Iterator[None]:
        """Applies the adapter of each token to the single row of the call within the context.

        Args:
            model: the adapted model.
            names: the adapter of each token.
            begins: whether a new request begins.
        """
        last = self._last.get(PackedRun)
        continues = last is not None and last.names == names and not begins
        given = Arguments(model, {})
        batch = last if continues and last is not None else self._make(model, names, given, PackedRun)
        before, self.current.run = self.current.run, PackedRun(batch, model, given, is_checked=True)
        try:
            yield
        finally:
            self.current.run = before

    def find_rows(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Determines in which dimension each layer sees the rows.

        Args:
            model: the adapted model.
            inputs: the arguments of the current call, by name.
        """
        before, self.current.run = self.current.run, None
        try:
            self._places.measure(model, list(adapted_modules(model)), inputs)
        finally:
            self.current.run = before

    def _make(
        self,
        model: nn.Module,
        names: tuple[str, ...] | str,
        given: Arguments,
        kind: type | None = None,
    ) -> Batch:
        kind = kind or type(names)
        self._last.pop(kind, None)
        if not isinstance(names, str) and len(set(names)) > 1:
            self.find_rows(model, given.named)
        grad = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(grad), self._gate.alone() as is_alone:
            # continuous batching stacks too often for moves, which take more time than copies
            may_move = is_alone and kind is tuple and not (grad or torch.compiler.is_compiling())
            batch = Batch(model, names, self._places, self._homes if may_move else None)
        self._hook(model, batch)
        if not batch.has_graph:
            self._last[kind] = batch
        return batch

    def _hook(self, model: nn.Module, batch: Batch) -> None:
        for module in (model, *batch.stacks, *batch.others, *batch.idle):
            if isinstance(module, LoraLayer) and can_stand_in(module):
                own = vars(module).get("forward")
                if own is None or own.current is not self.current:
                    LayerForward(module, self.current).install()
            elif module is not model:
                NamedRows(self._names_for).install([module])
            elif not self._own_hooks(model._forward_pre_hooks):
                model.register_forward_pre_hook(self._before_model, with_kwargs=True)
                model.register_forward_hook(self._after_model)

    def _own_hooks(self, hooks: Mapping[int, Any]) -> list[int]:
        return [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is self]

    def _before_model(self, module: nn.Module, *call: Any) -> None:
        run = self.current.run
        if run is None:
            return
        arguments = Arguments.of(module, *call)
        run.begin_call_of_model(arguments)
        if not run.is_checked and run.tokens != 1:
            run.batch = self._make(module, run.batch.names, arguments)
        run.is_checked = True

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        run = self.current.run
        cache = cache_in(output)
        if run is not None and hasattr(cache, "get_seq_length"):
            run.batch.caches.add(cache)

    def _names_for(self, module: nn.Module, x: Any) -> Sequence[str] | None:
        run = self.current.run
        return run.names_for(module, x) if run is not None and run.is_mixed else None


def _is_alone(layer: Any, name: str) -> bool:
    """Returns whether an adapter is the only active one of a layer."""
    return list(layer.active_adapters) == [name]


def _has(module: Any, name: str) -> bool:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return name in module._adapters
    return name in module.lora_A or name in module.lora_embedding_A
