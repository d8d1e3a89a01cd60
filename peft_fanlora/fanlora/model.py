"""FanLoraModel: LoRA that can score its modules and drop the less important ones."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from itertools import islice
from operator import length_hint
from typing import Any

import peft
import torch
import transformers
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers
from torch import nn

from ..adapters import require_fit, require_usable_names, taken_back
from ..serving.continuous_batching import Request
from ..tenants import ServesTenants, adapted_modules, changing
from .batches import Batches
from .gates import InitialFactors
from .importance import METHODS, Method, score
from .modules import ModuleName, adapted_modules_of, exact_names, lora_factors, lora_modules, model_type, num_layers
from .pruning import is_running, remove_adapter, restore_base_weight, rewrite_targets
from .scores import ImportanceScores
from .scoring import inference_state, prepared
from .setting import FanLoraSetting
from .targets import exact_targets, exclude_unsupported, follow_renamed_targets, linear_layers_in


_LORA_PARTS = {*LoraLayer.adapter_layer_names, "lora_dropout", "lora_magnitude_vector"}


class FanLoraModel(ServesTenants, LoraModel):
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
        config: Any = self.peft_config[adapter_name]
        targets = None
        if isinstance(config.setting, FanLoraSetting):
            setting = config.setting.resolve(model)
            targets = exact_targets(self, config, model, setting)
            config.target_modules, config.setting = targets, setting
        elif str(config.target_modules).lower() == "all-linear":
            if config.layers_to_transform not in (None, []):
                linear_layers_in(config, model)
            exclude_unsupported(config, model)
        else:
            follow_renamed_targets(config, model)
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
        """Scores how much each module of an adapter matters, step (b) of the method.

        That each module is assessed with a score is the paper's [P]; the scores and the default are ours, see
        `peft_fanlora.fanlora.importance` for their equations. The model runs in eval mode with this adapter alone, and
        is bit-identical afterwards: weights, `requires_grad`, gradients, training flags and random state.

        Args:
            dataloader: the calibration data, dicts of the forward's arguments with `labels`, as a trainer's data
                collator makes them. Tensors are moved to the model's device. None will do for "weight_norm".
            method: "path" (K forward and backward passes a batch), "ablation" (2M+1 forward passes), "sensitivity"
                (one pass), "output_norm" (one forward pass) or "weight_norm" (no data).
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
        if method not in METHODS:
            raise ValueError(f"method={method!r} is unknown; use one of {', '.join(METHODS)}.")
        for argument, value in (("num_batches", num_batches), ("num_points", num_points)):
            if value is not None and value < 1:
                raise ValueError(f"`{argument}` is {value}; it has to be at least 1.")
        if dataloader is None and method != "weight_norm":
            raise ValueError(f"method={method!r} needs calibration data; pass a dataloader.")
        if isinstance(dataloader, str) or not (
            dataloader is None or hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
        ):
            raise ValueError(f"`dataloader` is {dataloader!r}; pass an iterable of batches, such as a DataLoader.")
        adapter_name = self._require_usable_adapter(adapter_name)
        layers = self._require_modules(adapter_name)
        length = length_hint(dataloader, 0) or None
        total = length if num_batches is None else min(num_batches, length or num_batches)

        with self.call_gate.closed(), inference_state(self, adapter_name):
            loaded = () if dataloader is None else dataloader  # a streamed one has no length, and so no truth value
            batches = (prepared(batch, self.model) for batch in islice(loaded, num_batches))
            values, num_tokens = score(
                self.model,
                layers,
                adapter_name,
                batches,
                method=method,
                num_points=num_points,
                num_batches=total,
                initial=self._initial_factors.get(adapter_name, {}),
                progress=progress,
            )
        facts = {
            "num_points": num_points if method == "path" else None,
            "num_batches": num_batches,
            "base_model_name_or_path": self.peft_config[adapter_name].base_model_name_or_path,
            "peft_version": peft.__version__,
            "transformers_version": transformers.__version__,
        }
        return ImportanceScores(
            dict(zip(layers, values.tolist(), strict=True)),
            method=method,
            num_tokens=num_tokens,
            num_layers=num_layers(self.model, map(ModuleName.parse, layers)),
            model_type=model_type(self.model),
            calibration={key: value for key, value in facts.items() if value is not None},
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
            return self._prune(setting, adapter_name)

    def _prune(self, setting: FanLoraSetting, adapter_name: str | None) -> FanLoraSetting:
        if is_running(self.model):  # a call of the base model itself
            raise RuntimeError(
                "The model is in the middle of a call, whose layers cannot be removed: prune between calls."
            )
        adapter_name = self._require_usable_adapter(adapter_name)
        layers = self._require_modules(adapter_name)
        setting = setting.resolve(self.model)
        missing = [name for name in setting.names if name not in layers]
        if missing:
            raise ValueError(
                f"The setting keeps {missing[0]!r}, which adapter {adapter_name!r} does not adapt (any more); "
                f"it has {len(layers)} modules. Score this adapter, or make a new one with FanLoraConfig(setting=...)."
            )
        initial = self._initial_factors.get(adapter_name, {})
        dropped = [name for name in layers if name not in set(setting.names)]
        for name in dropped:
            base_layer: Any = layers[name].get_base_layer()
            if name in initial and not base_layer.weight.is_floating_point():
                raise ValueError(
                    f"The initialisation of adapter {adapter_name!r} changed the quantised weight of {name!r}, which "
                    "can't be undone exactly. Use init_lora_weights=True on quantised models that will be pruned."
                )

        for name in dropped:
            if name in initial:
                restore_base_weight(layers[name], adapter_name, initial.pop(name))
            remove_adapter(self, name, layers[name], adapter_name)
        rewrite_targets(self, adapter_name, setting)
        return setting

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Prepares saved weights for loading, as in LoRA: names of older versions of the architecture are converted.

        Raises:
            ValueError: no tensor fits the adapter.
        """
        state_dict = convert_peft_adapter_state_dict_for_transformers(
            model, _as_lora(config), state_dict, adapter_name=adapter_name
        )
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        require_fit(remapped, adapter_name, cls.prefix)
        return remapped

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

    def _require_usable_adapter(self, adapter_name: str | None) -> str:
        """Returns the adapter to work on, after checking that it is there and computes."""
        if adapter_name is None:
            if len(self.active_adapters) != 1:
                raise ValueError(
                    f"{len(self.active_adapters)} adapters are active ({self.active_adapters}); say which one is meant "
                    "with `adapter_name`."
                )
            (adapter_name,) = self.active_adapters
        if adapter_name not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter_name!r}; this model has {sorted(self.peft_config)}.")
        lora_layers = list(_lora_layers(self.model))
        if any(layer.merged for layer in lora_layers):
            raise ValueError("The adapter is merged into the base weights; call `unmerge_adapter()` first.")
        if any(layer.disable_adapters for layer in lora_layers):
            raise ValueError("The adapters are switched off; call `enable_adapter_layers()` first.")
        return adapter_name

    def _require_modules(self, adapter_name: str) -> dict[str, LoraLayer]:
        layers = lora_modules(self.model, adapter_name)
        if not layers:
            raise ValueError(
                f"Adapter {adapter_name!r} adapts no linear layer that FanLoRA chooses among; embeddings, heads and "
                "vision towers are not scored. Use target_modules='all-linear'."
            )
        factors = (factor for layer in layers.values() for factor in lora_factors(layer, adapter_name))
        if any(hasattr(factor, "device_mesh") for factor in factors):
            raise ValueError(
                f"The weights of adapter {adapter_name!r} are sharded over processes, as by FSDP, which neither lets its "
                "parts run alone nor parameters go. Save the adapter, load it in a single process, score and prune it "
                "there, and begin the next run from what that saves."
            )
        return layers


def _lora_layers(model: nn.Module) -> Iterator[LoraLayer]:
    return (module for module in adapted_modules(model) if isinstance(module, LoraLayer))


def _as_lora(config: Any) -> Any:
    """Returns a copy of a configuration of type LORA, for what PEFT does for that type alone."""
    as_lora = copy(config)
    as_lora.peft_type = PeftType.LORA
    return as_lora
