"""FanLoraModel: LoRA that can score its modules and drop the less important ones.

What scores, prunes and mixes adapters is imported where it is used: `import peft_fanlora` stays as quick as `import peft`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ..serving.adapters import require_usable_names, taken_back
from ..serving.tenants import TenantMixin, adapted_modules, changing
from .candidates import adapted_modules_of, exact_names, lora_factors, lora_modules
from .setting import FanLoraSetting


if TYPE_CHECKING:
    from ..serving.continuous_batching import Request
    from .batches import Batches
    from .gates import InitialFactors
    from .importance import Method
    from .scores import ImportanceScores

_LORA_PARTS = {*LoraLayer.adapter_layer_names, "lora_dropout", "lora_magnitude_vector"}


class FanLoraModel(TenantMixin, LoraModel):
    """FanLoRA: LoRA on all linear layers, scored module by module, of which only the most critical ones stay.

    Every module computes y = W_m x + (α/r) B_m A_m x with LoRA's own layers; what is added here is the choice of the
    modules. `get_peft_model` makes it for a `FanLoraConfig`, and a `PeftModel` passes the methods below on.

    Examples:
        >>> model = get_peft_model(base, FanLoraConfig(r=8, task_type="CAUSAL_LM"))
        >>> ...  # (a) train on instructions
        >>> scores = model.score_modules(dataloader)  # (b)
        >>> setting = model.prune_modules(scores.select(keep=2))  # (c)
        >>> model = get_peft_model(base, FanLoraConfig(setting=setting, r=27, task_type="CAUSAL_LM"))  # (d)
    """

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter's layers, on the modules of the configuration's setting where there is one.

        Raises:
            ValueError: the setting does not fit the model, or disagrees with `target_modules`; the name is one of a part
                of the model.
        """
        is_known = any(adapter_name in layer._all_available_adapter_names() for layer in _lora_layers(model))
        with (
            changing(self.call_gate, model, adapter_name),
            taken_back(self, model, adapter_name, is_known=is_known),
        ):
            if not is_known:
                require_usable_names(model, adapter_name, self.peft_config, _LORA_PARTS)
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        from .targets import find_targets

        config: Any = self.peft_config[adapter_name]
        targets = find_targets(self, config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        config.target_modules = targets or config.target_modules  # PEFT shortens many names to what they end in
        self.continuous_batching.install()
        if config.mutates_base_weights:
            layers = lora_modules(model, adapter_name)
            initial = {name: lora_factors(layer, adapter_name) for name, layer in layers.items()}
            self._initial_factors[adapter_name] = {
                name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in initial.items()
            }

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Raises where LoRA has no effect, as on Mamba's fused layers; PEFT tells by the type LORA whom this concerns."""
        super()._check_target_module_compatiblity(_as_lora(peft_config), model, target_name)

    @cached_property
    def _initial_factors(self) -> dict[str, dict[str, InitialFactors]]:
        """For each adapter whose initialisation changed base weights, what it took out of each of them."""
        return {}

    @cached_property
    def _batches(self) -> Batches:
        from .batches import Batches

        return Batches()

    def _after_change(self) -> None:
        self._batches.forget()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Gives each row of the calls inside of the context the adapter that `adapter_names` names, or the active one.

        Raises:
            ValueError: the model is training, there is no adapter of some name, or the names are not one for each row.
        """
        names = kwargs.pop("adapter_names", None)
        with self.calling(kwargs), super()._enable_peft_forward_hooks(*args, **kwargs):
            running: AbstractContextManager[None] = nullcontext()
            if names is not None:
                running = self._batches.running(self.model, self.row_names(names), args, kwargs)
            elif self._computes_with_one_adapter():
                running = self._batches.running(self.model, self.active_adapters[0], args, kwargs)
            with running:
                yield

    def _computes_with_one_adapter(self) -> bool:
        """Whether a call without names is an inference with one adapter, which can run as a batch of its own."""
        in_inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        is_replica = hasattr(self, "_is_replica")  # of `DataParallel`, gone after the call
        return in_inference and not is_replica and len(self.active_adapters) == 1 and self._batches.current.run is None

    def names_of_thread(self) -> tuple[str, ...] | None:
        """Returns the adapter of each row of this thread's mixed batch; None outside of one."""
        run = self._batches.current.run
        return run.batch.names if run is not None and isinstance(run.batch.names, tuple) else None

    def decoding(self, requests: Sequence[Request], kept: dict[str, Any]) -> AbstractContextManager[None]:
        """Gives each token of a packed row, inside of the context, its request's adapter."""
        names = tuple(str(request.adapter) for request in requests for _ in range(request.num_tokens))
        return self._batches.decoding(self.model, names, begins=any(request.begins for request in requests))

    def find_rows(self) -> None:
        """Finds out where the layers see the rows, while the model runs as usual."""
        self._batches.find_rows(self.model, {})

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._batches.leave(self.model)
        self.continuous_batching.remove()
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, see `peft.PeftModel.delete_adapter`."""
        super().delete_adapter(adapter_name)
        self._initial_factors.pop(adapter_name, None)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combines adapters into a new one, see `peft.LoraModel.add_weighted_adapter`.

        The new adapter has the modules of all of them, and so the setting of none.
        """
        configs = [self.peft_config[name] for name in adapters if name in self.peft_config]
        before = [(config, config.setting, config.target_modules) for config in configs]
        adapted = {key for name in adapters for key in adapted_modules_of(self.model, name)}
        try:
            for config in configs:
                config.setting, config.target_modules = None, exact_names(adapted, self.model)
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            for config, setting, target_modules in before:
                config.setting, config.target_modules = setting, target_modules

    def score_modules(
        self,
        dataloader: Iterable[Mapping[str, Any]] | None,
        method: Method = "path",
        *,
        num_batches: int | None = None,
        num_points: int = 8,
        adapter_name: str | None = None,
        progress: bool = True,
    ) -> ImportanceScores:
        """Returns how much each module of an adapter matters, step (b) of the method.

        That each module is assessed with a score is the paper's [P]; the scores and the default are ours, see
        `peft_fanlora.fanlora.importance` for their equations. The model runs in eval mode with this adapter alone, and
        is bit-identical afterwards: weights, `requires_grad`, gradients, training flags and random state.

        Args:
            dataloader: the calibration data, dicts of the forward's arguments with `labels`, as a trainer's data
                collator makes them. Tensors are moved to the model's device. None will do for "weight_norm".
            method: "path" (K forward and backward passes per batch), "ablation" (2M+1 forward passes), "sensitivity"
                (one pass), "output_norm" (one forward pass) or "weight_norm" (no data); or a function of your own, see
                `peft_fanlora.fanlora.importance.importance_score`.
            num_batches: how many batches to use; None for all.
            num_points: K, the number of points that "path" integrates over.
            adapter_name: which adapter; None for the active one.
            progress: whether to show a progress bar.

        Returns:
            A dict-like of scores by module name, higher is more important.

        Raises:
            RuntimeError: the model is in the middle of a call.
            ValueError: an argument is out of range; there is no such adapter, it is merged or switched off, or several
                are active and none is named; its weights are sharded by FSDP; the data has no labels; the loss is not
                finite.

        Examples:
            >>> scores = model.score_modules(dataloader, num_batches=4)
            >>> scores.plot("importance.png")
        """
        from .scoring import score_adapter

        with self.call_gate.closed():
            return score_adapter(
                self,
                dataloader,
                method,
                num_batches=num_batches,
                num_points=num_points,
                adapter_name=adapter_name,
                initial_factors=self._initial_factors,
                progress=progress,
            )

    def prune_modules(self, setting: FanLoraSetting, *, adapter_name: str | None = None) -> FanLoraSetting:
        """Removes an adapter from every module that a setting does not keep, in place; step (c) of the method [P].

        The LoRA layers go physically: a layer without any adapter left becomes the plain layer again. Other adapters,
        and LoRA on embeddings, heads and vision towers, which are no candidates, stay as they are. The configuration's
        `target_modules` then names what is left, and the setting is saved along with the adapter. The model's output
        is the one that it had with the removed modules' gates at 0. An optimizer that was built before still holds the
        removed parameters; `FanLoraCallback` takes care of that within a training run.

        Args:
            setting: from `ImportanceScores.select` or a file; one of another depth is transferred.
            adapter_name: which adapter; None for the active one.

        Returns:
            The setting in the terms of this model.

        Raises:
            ValueError: there is no such adapter, it is merged or several are active and none is named; the setting
                keeps a module that the adapter does not have; the setting does not fit the model; the adapter's
                weights are sharded by FSDP.
            RuntimeError: the model is in the middle of a call.
        """
        if not isinstance(setting, FanLoraSetting):
            raise ValueError(
                f"`setting` is a {type(setting).__name__}; pass what `scores.select(...)` or "
                "`FanLoraSetting.from_pretrained(...)` returns."
            )
        with self.call_gate.closed():
            from .pruning import prune

            return prune(self, setting, adapter_name, self._initial_factors)

    def prepare_for_weights(self, adapter_name: str, model_id: Any, download_kwargs: dict[str, Any]) -> None:
        """Prunes an adapter to the setting of the saved one whose weights are about to be loaded over it."""
        from .pruning import prune_as_saved

        prune_as_saved(self, adapter_name, model_id, download_kwargs)

    def config_to_join(self, model_id: Any, download_kwargs: dict[str, Any]) -> PeftConfig | None:
        """Returns the FanLoRA configuration of a saved LoRA adapter; None for adapters of other methods."""
        from .config import FanLoraConfig

        is_lora = PeftConfig._get_peft_type(str(model_id), **download_kwargs) == PeftType.LORA
        return FanLoraConfig.from_lora(model_id, **download_kwargs) if is_lora else None

    @classmethod
    def _follow_renamed_modules(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        as_lora = _as_lora(config)
        return convert_peft_adapter_state_dict_for_transformers(model, as_lora, state_dict, adapter_name=adapter_name)

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls,
        peft_model: Any,
        peft_config: Any,
        path_initial_model_for_weight_conversion: str,
        output_state_dict: dict[str, torch.Tensor],
        kwargs: dict[str, Any],
    ) -> dict[str, torch.Tensor]:
        """Converts a PiSSA-like adapter to one for the original base weights, as in LoRA.

        PEFT marks the initial adapter as plainly initialised only where the type is LORA, so that is done here.
        """
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        return super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, output_state_dict, kwargs
        )


def _lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in adapted_modules(model) if isinstance(module, LoraLayer))


def _as_lora(config: Any) -> Any:
    """Returns a copy of a configuration of type LORA, for what PEFT does for that type alone."""
    as_lora = copy(config)
    as_lora.peft_type = PeftType.LORA
    return as_lora
