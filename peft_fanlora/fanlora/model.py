"""The FanLoRA tuner: LoRA whose modules can be scored and pruned.

Modules for scoring, pruning and mixed batches are imported in the functions that use them, to keep the import fast.
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

from ..serving.tenants import adapted_modules, changing
from .candidates import adapted_modules_of, exact_names, lora_factors, lora_modules
from .homes import HomesMixin
from .setting import FanLoraSetting


if TYPE_CHECKING:
    from ..serving.continuous_batching import Request
    from .batches import Batches
    from .gates import InitialFactors
    from .importance import Method
    from .scores import ImportanceScores

_LORA_PARTS = {*LoraLayer.adapter_layer_names, "lora_dropout", "lora_magnitude_vector"}


class FanLoraModel(HomesMixin, LoraModel):
    """FanLoRA: applies LoRA to all linear layers, scores each module, and keeps only the most critical ones.

    Every module computes y = W_m x + (α/r) B_m A_m x with LoRA's own layers; this class adds the choice of modules.
    `get_peft_model` creates it for a `FanLoraConfig`, and the methods below can be called on the `PeftModel`.

    Examples:
        >>> model = get_peft_model(base, FanLoraConfig(r=8, task_type="CAUSAL_LM"))
        >>> ...  # (a) train on instructions
        >>> scores = model.score_modules(dataloader)  # (b)
        >>> setting = model.prune_modules(scores.select(keep=2))  # (c)
        >>> model = get_peft_model(base, FanLoraConfig(setting=setting, r=27, task_type="CAUSAL_LM"))  # (d)
    """

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter's layers, to the modules of the configuration's setting if there is one.

        Raises:
            ValueError: the setting does not fit the model or contradicts `target_modules`, or the adapter has the name
                of a part of the model.
        """
        from ..serving.adapters import require_usable_names, taken_back

        layers = (module for module in adapted_modules(model) if isinstance(module, LoraLayer))
        is_known = any(adapter_name in layer._all_available_adapter_names() for layer in layers)
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
        config.target_modules = targets or config.target_modules  # PEFT shortens many names to their common suffixes
        self.continuous_batching.install()
        if config.mutates_base_weights:
            layers = lora_modules(model, adapter_name)
            initial = {name: lora_factors(layer, adapter_name) for name, layer in layers.items()}
            self._initial_factors[adapter_name] = {
                name: (A.detach().clone(), B.detach().clone()) for name, (A, B) in initial.items()
            }

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Raises if LoRA has no effect, as on Mamba's fused layers, which PEFT only checks for the type LORA."""
        super()._check_target_module_compatiblity(_as_lora(peft_config), model, target_name)

    @cached_property
    def _initial_factors(self) -> dict[str, dict[str, InitialFactors]]:
        """Adapter name -> module name -> the factors that the initialisation subtracted from the base weight."""
        return {}

    @cached_property
    def _batches(self) -> Batches:
        from .batches import Batches

        return Batches(self.call_gate, self._homes)

    def _after_change(self) -> None:
        self._batches.forget()

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies to each row of the calls in this context the adapter given by `adapter_names`, or the active one.

        Raises:
            ValueError: the model is in training mode, an adapter does not exist, or there is not one name per row.
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
        """Whether a call without names is inference with a single adapter, which can run as a batch."""
        in_inference = not (self.training or torch.is_grad_enabled() or torch.compiler.is_compiling())
        is_replica = hasattr(self, "_is_replica")  # a replica of `DataParallel` is discarded after the call
        return in_inference and not is_replica and len(self.active_adapters) == 1 and self._batches.current.run is None

    def names_of_thread(self) -> tuple[str, ...] | None:
        """Returns the adapter of each row of the current thread's mixed batch; None outside of one."""
        run = self._batches.current.run
        return run.batch.names if run is not None and isinstance(run.batch.names, tuple) else None

    def decoding(self, requests: Sequence[Request], kept: dict[str, Any]) -> AbstractContextManager[None]:
        """Applies the adapter of each request to its tokens in a packed row within the context."""
        names = tuple(str(request.adapter) for request in requests for _ in range(request.num_tokens))
        return self._batches.decoding(self.model, names, begins=any(request.begins for request in requests))

    def find_rows(self) -> None:
        """Determines in which dimension the layers see the rows, before the attention is replaced."""
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

        The new adapter has the modules of all of them, and therefore no setting.
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
        """Computes the importance of each module of an adapter, step (b) of the method.

        Scoring each module is from the paper [P]; the scores and the default are ours, see
        `peft_fanlora.fanlora.importance` for their equations. The model runs in eval mode with only this adapter, and
        is bit-identical afterwards: weights, `requires_grad`, gradients, training flags and random state.

        Args:
            dataloader: the calibration data: batches as made by a trainer's data collator, dicts of the forward's
                arguments with `labels`. Tensors are moved to the model's device. May be None for "weight_norm".
            method: "path" (K forward and backward passes per batch), "ablation" (2M+1 forward passes), "sensitivity"
                (one pass), "output_norm" (one forward pass) or "weight_norm" (no data); or a custom function, see
                `peft_fanlora.fanlora.importance.importance_score`.
            num_batches: how many batches to use; None for all.
            num_points: K, the number of points of the "path" integral.
            adapter_name: the adapter; None for the active one.
            progress: whether to show a progress bar.

        Returns:
            A mapping from module names to scores; higher is more important.

        Raises:
            RuntimeError: the model is in the middle of a call.
            ValueError: an argument is out of range; the adapter does not exist, is merged or disabled, or several are
                active and none is named; its weights are sharded by FSDP or DeepSpeed; the data has no labels;
                the loss is not finite.

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
        """Removes an adapter in place from every module that a setting does not keep, step (c) of the method [P].

        LoRA layers without any remaining adapter are replaced by their base layers. Other adapters, and LoRA on
        embeddings, heads and vision towers, which are not candidates, are unchanged. The configuration's
        `target_modules` becomes the remaining modules, and the setting is saved with the adapter. The output of the
        model is the same as with the gates of the removed modules at 0. An existing optimizer still holds the removed
        parameters; `FanLoraCallback` removes them within a training run.

        Args:
            setting: from `ImportanceScores.select` or a file; a setting for another depth is transferred.
            adapter_name: the adapter; None for the active one.

        Returns:
            The setting with the module names of this model.

        Raises:
            ValueError: the adapter does not exist, is merged, or several are active and none is named; the setting
                keeps a module that the adapter does not have, or does not fit the model; the adapter's weights are
                sharded by FSDP or DeepSpeed.
            RuntimeError: the model is in the middle of a call.
        """
        if not isinstance(setting, FanLoraSetting):
            raise ValueError(
                f"`setting` is a {type(setting).__name__}; pass the result of `scores.select(...)` or "
                "`FanLoraSetting.from_pretrained(...)`."
            )
        with self.call_gate.closed():
            from .pruning import prune

            return prune(self, setting, adapter_name, self._initial_factors)

    def prepare_for_weights(self, adapter_name: str, model_id: Any, download_kwargs: dict[str, Any]) -> None:
        """Prunes an adapter to the setting of the saved adapter whose weights will be loaded into it."""
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

        PEFT marks the initial adapter as plainly initialised only for the type LORA, so this is done here.
        """
        peft_config.init_lora_weights = True
        peft_config.save_pretrained(path_initial_model_for_weight_conversion)
        return super()._convert_state_dict_for_initial_model(
            peft_model, peft_config, path_initial_model_for_weight_conversion, output_state_dict, kwargs
        )


def _as_lora(config: Any) -> Any:
    """Returns a copy of a configuration with the type LORA, for features that PEFT restricts to that type."""
    as_lora = copy(config)
    as_lora.peft_type = PeftType.LORA
    return as_lora
