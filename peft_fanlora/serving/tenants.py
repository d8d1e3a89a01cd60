"""Adds and removes tenants at a cost that does not grow with the number of loaded adapters.

PEFT iterates over all modules of a model, including those of every loaded adapter, many times for each adapter that it
adds. Here the other adapters are removed from the layers' containers during a change, and restored afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.modules.module import _global_forward_hooks

from .gate import CallGate


if TYPE_CHECKING:
    from .continuous_batching import ContinuousBatching


BASE_ROWS = "__base__"
"""PEFT's name for rows without an adapter."""


def wrong_length(names: Sequence[str], rows: int) -> ValueError:
    """Returns the error for a call whose number of rows differs from the number of names."""
    return ValueError(
        f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {rows} "
        f"respectively: pass one name per row, {BASE_ROWS!r} for rows without an adapter."
    )


def load_tenant(model: PeftModel, model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
    """Loads an adapter like `model.load_adapter`, at a cost that does not grow with the number of loaded adapters.

    It waits until no call of the model is running in any thread, and new calls wait until it is done.

    Args:
        model: a model with a FanLoRA or PARA adapter.
        model_id: a folder with a saved adapter, or a Hub repository id.
        adapter_name: the name for the adapter.
        kwargs: further arguments of `peft.PeftModel.load_adapter`.

    Returns:
        The return value of `load_adapter`.

    Raises:
        ValueError: the adapter does not fit the model, which is left unchanged.
        RuntimeError: it was called from inside a call of the model.

    Examples:
        >>> load_tenant(model, "adapters/customer-17", "customer-17")
        >>> model.generate(**inputs, adapter_names=["customer-17", "customer-3"])
    """
    tuner: Any = model.base_model
    gate: CallGate | None = getattr(tuner, "call_gate", None)
    if gate is None:
        raise ValueError(
            f"load_tenant supports models with FanLoRA or PARA, but this one has {type(tuner).__name__}: use "
            "model.load_adapter."
        )
    is_new = adapter_name not in model.peft_config  # PEFT may have to prune an existing adapter
    with gate.closed(), only_visible(tuner.model, adapter_name) if is_new else nullcontext():
        return model.load_adapter(model_id, adapter_name, **kwargs)


class TenantMixin:
    """What the tuners of both methods share: adapters are added, removed and switched between calls.

    Attributes:
        makes_vectors: whether adapters read their prompt, so that continuous batching must know the requests even if
            they name no adapters.
    """

    makes_vectors = False
    prefix: str
    model: Any
    active_adapters: list[str]
    peft_config: dict[str, PeftConfig]
    training: bool

    @cached_property
    def call_gate(self) -> CallGate:
        """Prevents calls of the model and changes of its adapters from overlapping."""
        return CallGate(self._after_change)

    def _after_change(self) -> None:
        """Clears state that depends on the adapters before a change."""

    @cached_property
    def continuous_batching(self) -> ContinuousBatching:
        """The model's methods for continuous batching."""
        from .continuous_batching import ContinuousBatching

        return ContinuousBatching(self)

    def calling(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Returns the context of a call. Steps of continuous batching enter the gate in their own thread."""
        return nullcontext() if arguments.get("cache_implementation") == "paged" else self.call_gate.passed()

    def row_names(self, adapter_names: Any) -> tuple[str, ...]:
        """Returns the adapter of each row as given by the caller, after checking that all exist.

        Raises:
            ValueError: the model is in training mode or sharded by DeepSpeed, an adapter does not exist, or an entry
                is not a name.
        """
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: mixed batches are for inference "
                "only. Call model.eval() first."
            )
        if hasattr(next(self.model.parameters()), "ds_id"):
            raise ValueError(
                "Cannot pass `adapter_names` to a model sharded by DeepSpeed ZeRO-3, whose processes gather the weights "
                "of all layers in the same order: they would mix up the weights of different adapters. Load the model "
                "without DeepSpeed, or use one adapter at a time (`set_adapter`) in all processes."
            )
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise ValueError(f"adapter_names is {adapter_names!r}: pass a list with one adapter name per row.")
        unknown = sorted(set(adapter_names) - self.peft_config.keys() - {BASE_ROWS})
        if unknown or not adapter_names:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown) or 'no name at all'}. The "
                f"adapters are {sorted(self.peft_config)}, and {BASE_ROWS!r} for the base model: load the adapter "
                "first, or correct the name."
            )
        return tuple(adapter_names)

    def computing_adapters(self) -> tuple[str, ...]:
        """Returns the adapters that a call without names uses: none while they are disabled."""
        layer = next((module for module in adapted_modules(self.model) if isinstance(module, BaseTunerLayer)), None)
        return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)

    @property
    def has_modules_saved_whole(self) -> bool:
        """Whether any adapter has `modules_to_save`."""
        return any(isinstance(module, AuxiliaryTrainingWrapper) for module in adapted_modules(self.model))

    def prepare_for_weights(self, adapter_name: str, model_id: Any, download_kwargs: dict[str, Any]) -> None:
        """Called before the weights of a saved adapter replace those of an existing adapter.

        Args:
            adapter_name: the adapter's name.
            model_id: the folder or id of the saved adapter.
            download_kwargs: how to read its configuration.
        """

    def config_to_join(self, model_id: Any, download_kwargs: dict[str, Any]) -> PeftConfig | None:
        """Returns the configuration for adding a saved adapter of another method to this model; None for its own.

        Args:
            model_id: the folder or id of the saved adapter.
            download_kwargs: how to read its configuration.
        """
        return None

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        from .sharding import require_whole

        found = super()._get_adapter_state_dict(*args, **kwargs)  # type: ignore[misc]
        require_whole(found, kwargs["adapter_name"])
        return found

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Prepares saved weights for loading. Names of older versions of the architecture are converted, as for LoRA.

        Raises:
            ValueError: no tensor fits the adapter.
        """
        state_dict = cls._follow_renamed_modules(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model, config, adapter_name, state_dict
        )
        from .adapters import require_fit

        require_fit(remapped, adapter_name, cls.prefix)
        return remapped

    @classmethod
    def _follow_renamed_modules(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns saved weights by the current names of their modules."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, see `peft.PeftModel.delete_adapter`.

        If it is active, PEFT activates another adapter instead, and needs access to all of them for that.
        """
        is_active = adapter_name in self.active_adapters
        with self.call_gate.closed(), nullcontext() if is_active else only_visible(self.model, adapter_name):
            super().delete_adapter(adapter_name)  # type: ignore[misc]

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merges adapters into the base weights, see `peft.PeftModel.merge_adapter`."""
        with self.call_gate.closed():
            super().merge_adapter(*args, **kwargs)  # type: ignore[misc]

    def unmerge_adapter(self) -> None:
        """Removes merged adapters from the base weights, see `peft.PeftModel.unmerge_adapter`."""
        with self.call_gate.closed():
            super().unmerge_adapter()  # type: ignore[misc]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Activates adapters, see `peft.PeftModel.set_adapter`."""
        with self._switching():
            super().set_adapter(*args, **kwargs)  # type: ignore[misc]

    def enable_adapter_layers(self) -> None:
        """Enables the adapters, see `peft.tuners.tuners_utils.BaseTuner.enable_adapter_layers`."""
        with self._switching():
            super().enable_adapter_layers()  # type: ignore[misc]

    def disable_adapter_layers(self) -> None:
        """Disables the adapters, see `peft.tuners.tuners_utils.BaseTuner.disable_adapter_layers`."""
        with self._switching():
            super().disable_adapter_layers()  # type: ignore[misc]

    def _switching(self) -> AbstractContextManager[None]:
        """Returns the context of switching adapters. It blocks calls of other threads; a call may switch adapters."""
        return nullcontext() if self.call_gate.is_passed else self.call_gate.closed()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with self.call_gate.closed():
            return super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def changing(gate: CallGate, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Context of a change to one adapter. No call is running, and PEFT only sees this adapter."""
    with gate.closed(), only_visible(model, adapter_name):
        yield


@contextmanager
def only_visible(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Removes all other adapters' modules from the model's layers within the context.

    Args:
        model: the adapted model.
        adapter_name: the adapter that PEFT should find.
    """
    hidden = []
    layers = [module for module in adapted_modules(model) if not isinstance(module, AuxiliaryTrainingWrapper)]
    for layer in layers:
        for container in layer.children():
            if isinstance(container, nn.ModuleDict) and container.keys() - {adapter_name}:
                everything = container._modules
                container._modules = {name: everything[name] for name in (adapter_name,) if name in everything}
                hidden.append((container, everything, container.training))
    try:
        yield
    finally:
        for container, everything, training in hidden:
            everything.pop(adapter_name, None)
            everything.update(container._modules)
            container._modules = everything
            if container.training != training:
                container.train(container.training)


def adapted_modules(model: nn.Module) -> Iterator[Any]:
    """Yields the modules that hold adapters, without iterating over the adapters, of which there may be thousands."""
    waiting: list[nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, BaseTunerLayer):
            yield module
            waiting.append(cast(Any, module).base_layer)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            yield module
            waiting.append(module.original_module)
        else:
            waiting.extend(module.children())


def is_observed(layer: Any) -> bool:
    """Returns whether other code, such as a hook, may keep a layer's output, so that it must not be overwritten."""
    return bool(layer._forward_hooks or _global_forward_hooks or "forward" in vars(layer))
