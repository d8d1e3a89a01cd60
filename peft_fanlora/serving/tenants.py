"""Tenants that come and go: adding one to a thousand costs what adding one to ten does.

PEFT walks over all modules of a model, and so over every loaded adapter, many times for each adapter that it adds. While
it does so here, the adapters that are not concerned are taken out of the layers' containers, and put back afterwards.
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

from .adapters import require_fit
from .gate import CallGate


if TYPE_CHECKING:
    from .continuous_batching import ContinuousBatching


BASE_ROWS = "__base__"
"""The name that PEFT gives to rows without an adapter."""


def wrong_length(names: Sequence[str], rows: int) -> ValueError:
    """Returns the error of a call that has other rows than there are names for."""
    return ValueError(
        f"Length of `adapter_names` should be the same as the number of inputs, but got {len(names)} and {rows} respectively: "
        f"pass one name for each row, {BASE_ROWS!r} for those without an adapter."
    )


def load_tenant(model: PeftModel, model_id: Any, adapter_name: str, **kwargs: Any) -> Any:
    """Loads an adapter like `model.load_adapter`, at a cost that does not grow with the adapters already there.

    It waits until no call of the model is running in any thread, and new calls wait until it is done.

    Args:
        model: a model with a FanLoRA or PARA adapter.
        model_id: a folder with a saved adapter, or the id of a Hub repository.
        adapter_name: what to call the adapter.
        kwargs: further arguments of `peft.PeftModel.load_adapter`.

    Returns:
        What `load_adapter` returns.

    Raises:
        ValueError: the adapter does not fit the model; the model is as it was before.
        RuntimeError: it was called from inside of a call of the model.

    Examples:
        >>> load_tenant(model, "adapters/customer-17", "customer-17")
        >>> model.generate(**inputs, adapter_names=["customer-17", "customer-3"])
    """
    tuner: Any = model.base_model
    gate: CallGate | None = getattr(tuner, "call_gate", None)
    if gate is None:
        raise ValueError(
            f"load_tenant serves models with FanLoRA or PARA, and this one has {type(tuner).__name__}: use "
            "model.load_adapter."
        )
    is_new = adapter_name not in model.peft_config  # over one that is there, PEFT may have to prune it
    with gate.closed(), only_visible(tuner.model, adapter_name) if is_new else nullcontext():
        return model.load_adapter(model_id, adapter_name, **kwargs)


class TenantMixin:
    """What the tuners of both methods have in common: adapters that come, go and change between calls.

    Attributes:
        makes_vectors: whether an adapter reads its prompt, so that a step of continuous batching has to know the requests
            also where they name no adapters.
    """

    makes_vectors = False
    prefix: str
    model: Any
    active_adapters: list[str]
    peft_config: dict[str, PeftConfig]
    training: bool

    @cached_property
    def call_gate(self) -> CallGate:
        """Keeps calls of the model and changes of its tenants apart."""
        return CallGate(self._after_change)

    def _after_change(self) -> None:
        """Lets go of what depends on the adapters that there were before a change."""

    @cached_property
    def continuous_batching(self) -> ContinuousBatching:
        """The model's entries to continuous batching."""
        from .continuous_batching import ContinuousBatching

        return ContinuousBatching(self)

    def calling(self, arguments: Mapping[str, Any]) -> AbstractContextManager[None]:
        """For the length of a call; the steps of continuous batching pass the gate by themselves, in another thread."""
        return nullcontext() if arguments.get("cache_implementation") == "paged" else self.call_gate.passed()

    def row_names(self, adapter_names: Any) -> tuple[str, ...]:
        """Returns the adapter of each row as the caller names it, after checking that all are there.

        Raises:
            ValueError: the model is training, there is no adapter of some name, or these are no names.
        """
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode: rows are mixed in inference only. Call "
                "model.eval() first."
            )
        if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
            raise ValueError(f"adapter_names is {adapter_names!r}: pass a list with the adapter's name for each row.")
        unknown = sorted(set(adapter_names) - self.peft_config.keys() - {BASE_ROWS})
        if unknown or not adapter_names:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown) or 'no name at all'}. The adapters "
                f"are {sorted(self.peft_config)}, and {BASE_ROWS!r} for the base model: load the adapter first, or "
                "correct the name."
            )
        return tuple(adapter_names)

    def computing_adapters(self) -> tuple[str, ...]:
        """Returns the adapters that a call without names computes with: none while they are disabled."""
        layer = next((module for module in adapted_modules(self.model) if isinstance(module, BaseTunerLayer)), None)
        return () if layer is None or layer.disable_adapters else tuple(layer.active_adapters)

    @property
    def has_modules_saved_whole(self) -> bool:
        """Whether some adapter has `modules_to_save`."""
        return any(isinstance(module, AuxiliaryTrainingWrapper) for module in adapted_modules(self.model))

    def prepare_for_weights(self, adapter_name: str, model_id: Any, download_kwargs: dict[str, Any]) -> None:
        """Called before the weights of a saved adapter are loaded over those of an adapter that is there.

        Args:
            adapter_name: the adapter's name.
            model_id: the folder or the id of the saved adapter.
            download_kwargs: how to read its configuration.
        """

    def config_to_join(self, model_id: Any, download_kwargs: dict[str, Any]) -> PeftConfig | None:
        """Returns the configuration with which a saved adapter of another method joins this one's; None for its own.

        Args:
            model_id: the folder or the id of the saved adapter.
            download_kwargs: how to read its configuration.
        """
        return None

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Prepares saved weights for loading; names of older versions of the architecture are converted, as for LoRA.

        Raises:
            ValueError: no tensor fits the adapter.
        """
        state_dict = cls._follow_renamed_modules(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model, config, adapter_name, state_dict
        )
        require_fit(remapped, adapter_name, cls.prefix)
        return remapped

    @classmethod
    def _follow_renamed_modules(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Returns saved weights by the names that their modules have today."""
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, see `peft.PeftModel.delete_adapter`.

        Where it is active PEFT makes another one active in its place, and has to see all of them for that.
        """
        is_active = adapter_name in self.active_adapters
        with self.call_gate.closed(), nullcontext() if is_active else only_visible(self.model, adapter_name):
            super().delete_adapter(adapter_name)  # type: ignore[misc]

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Merges adapters into the base weights, see `peft.PeftModel.merge_adapter`."""
        with self.call_gate.closed():
            super().merge_adapter(*args, **kwargs)  # type: ignore[misc]

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the base weights, see `peft.PeftModel.unmerge_adapter`."""
        with self.call_gate.closed():
            super().unmerge_adapter()  # type: ignore[misc]

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Activates adapters, see `peft.PeftModel.set_adapter`."""
        with self._switching():
            super().set_adapter(*args, **kwargs)  # type: ignore[misc]

    def enable_adapter_layers(self) -> None:
        """Switches the adapters on, see `peft.tuners.tuners_utils.BaseTuner.enable_adapter_layers`."""
        with self._switching():
            super().enable_adapter_layers()  # type: ignore[misc]

    def disable_adapter_layers(self) -> None:
        """Switches the adapters off, see `peft.tuners.tuners_utils.BaseTuner.disable_adapter_layers`."""
        with self._switching():
            super().disable_adapter_layers()  # type: ignore[misc]

    def _switching(self) -> AbstractContextManager[None]:
        """Keeps other threads' calls out of a switch; a call may switch adapters itself."""
        return nullcontext() if self.call_gate.is_passed else self.call_gate.closed()

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        with self.call_gate.closed():
            return super()._unload_and_optionally_merge(*args, **kwargs)  # type: ignore[misc]


@contextmanager
def changing(gate: CallGate, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """For the length of a change to one adapter: between calls, and with PEFT looking at this adapter alone."""
    with gate.closed(), only_visible(model, adapter_name):
        yield


@contextmanager
def only_visible(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Takes all other adapters' modules out of the model's layers, for as long as the context lasts.

    Args:
        model: the adapted model.
        adapter_name: the one adapter that PEFT is to find there.
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
    """Yields the modules that hold adapters, in any order, without a look at the adapters: there may be thousands."""
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
