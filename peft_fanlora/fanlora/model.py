"""FanLoraModel: LoRA that can score its modules and drop the less important ones."""

import random
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from functools import cached_property
from itertools import islice
from operator import length_hint
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import PeftConfig, PeftType
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn

from ..serving.continuous_batching import Request
from ..tenants import ServesTenants, changing
from .batches import Batches
from .config import FanLoraConfig
from .gates import InitialFactors, factors
from .importance import METHODS, Method, score
from .modules import Module, adapted_layers, candidates, lora_modules, model_type, num_layers
from .pruning import give_back, is_running, remove_adapter, rewrite_targets
from .scores import ImportanceScores
from .setting import FanLoraSetting
from .targets import leave_out_unfit, linear_layers_in


class FanLoraModel(ServesTenants, LoraModel):
    """FanLoRA: LoRA on all linear layers, scored module by module, of which only the most critical ones stay.

    Every module computes y = W_m x + (α/r) B_m A_m x with LoRA's own layers; what is added here is the choice of the
    modules. `get_peft_model` makes it for a `FanLoraConfig`, and a `PeftModel` passes the methods below on.

    Examples:
        >>> model = get_peft_model(base, FanLoraConfig(r=8, task_type="CAUSAL_LM"))
        >>> ...  # (a) train on instructions
        >>> scores = model.score_modules(dataloader)  # (b)
        >>> setting = model.prune_modules(scores.select(modules_per_layer=2))  # (c)
        >>> model = get_peft_model(base, FanLoraConfig(setting=setting, r=27, task_type="CAUSAL_LM"))  # (d)
    """

    peft_config: dict[str, Any]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Adds the adapter's layers, on the modules of the configuration's setting where there is one.

        Raises:
            ValueError: the setting does not fit the model, or disagrees with `target_modules`.
        """
        self._batches.forget()
        with changing(self.call_gate, model, adapter_name):
            self._inject(model, adapter_name, *args, **kwargs)

    def _inject(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        config: Any = self.peft_config[adapter_name]
        if isinstance(config.setting, FanLoraSetting):
            setting = config.setting.resolve(model)
            if str(config.target_modules).lower() == "all-linear":
                config.target_modules = set(setting.names)
            elif chosen := _disagreement(self, config, model, setting):
                raise ValueError(
                    f"`target_modules` and `setting` disagree, for instance about {chosen!r}: a setting already says "
                    "which modules are adapted. Pass one of the two."
                )
            config.setting = setting
        elif str(config.target_modules).lower() == "all-linear":
            if config.layers_to_transform not in (None, []):
                config.target_modules = linear_layers_in(config.layers_to_transform, config.layers_pattern, model)
            leave_out_unfit(config, model)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self.continuous_batching.install()
        if config.mutates_base_weights:
            initial = {name: factors(layer, adapter_name) for name, layer in lora_modules(model, adapter_name).items()}
            self._initial_factors[adapter_name] = {name: (A.clone(), B.clone()) for name, (A, B) in initial.items()}

    def _check_target_module_compatiblity(self, peft_config: PeftConfig, model: nn.Module, target_name: str) -> None:
        """Raises where LoRA has no effect, as on Mamba's fused layers; PEFT tells by the type LORA whom this concerns."""
        as_lora = copy(peft_config)
        as_lora.peft_type = PeftType.LORA
        super()._check_target_module_compatiblity(as_lora, model, target_name)

    @property
    def _initial_factors(self) -> dict[str, dict[str, InitialFactors]]:
        """For each adapter whose initialisation changed base weights, what it took out of each of them."""
        return self.__dict__.setdefault("_initial_factors_by_adapter", {})

    @cached_property
    def _batches(self) -> Batches:
        return Batches()

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
        self._batches.find_rows(self.model)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> Any:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        self._batches.leave(self.model)
        self.continuous_batching.remove()
        return model

    def delete_adapter(self, adapter_name: str) -> None:
        """Deletes an adapter, see `peft.PeftModel.delete_adapter`."""
        self._batches.forget()
        super().delete_adapter(adapter_name)
        self._initial_factors.pop(adapter_name, None)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Combines adapters into a new one, see `peft.LoraModel.add_weighted_adapter`.

        The new adapter has the modules of all of them, and so the setting of none.
        """
        settings = {name: self.peft_config[name].setting for name in adapters if name in self.peft_config}
        try:
            for name in settings:
                self.peft_config[name].setting = None
            super().add_weighted_adapter(adapters, *args, **kwargs)
        finally:
            for name, setting in settings.items():
                self.peft_config[name].setting = setting

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
        adapter_name = self._require_usable_adapter(adapter_name)
        layers = self._require_modules(adapter_name)
        length = length_hint(dataloader, 0) or None
        total = length if num_batches is None else min(num_batches, length or num_batches)

        with _inference_state(self, adapter_name):
            loaded = () if dataloader is None else dataloader  # a streamed one has no length, and so no truth value
            batches = (_prepared(batch, self.model) for batch in islice(loaded, num_batches))
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
            num_layers=num_layers(self.model, map(Module.parse, layers)),
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
            RuntimeError: the model is in the middle of a forward pass.
        """
        if not isinstance(setting, FanLoraSetting):
            raise ValueError(
                f"`setting` is a {type(setting).__name__}; pass what `scores.select(...)` or "
                "`FanLoraSetting.from_pretrained(...)` returns."
            )
        if is_running(self.model):
            raise RuntimeError(
                "The model is in the middle of a forward pass, whose layers cannot be removed; prune between steps."
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

        self._batches.forget()
        for name in dropped:
            if name in initial:
                give_back(layers[name], adapter_name, initial.pop(name))
            remove_adapter(self, name, layers[name], adapter_name)
        rewrite_targets(self, adapter_name, setting)
        return setting

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Prepares saved weights for loading, as in LoRA; an adapter of the same name is pruned as they are.

        A trainer resumes by loading a checkpoint over the adapter that the script has just made, on all modules. If
        the checkpoint was saved after pruning, its modules are fewer, and the others would stay in the model untrained.
        """
        tuner = getattr(model, "base_model", None)
        if isinstance(tuner, FanLoraModel) and state_dict:
            layers = lora_modules(tuner.model, adapter_name)
            saved = {
                key.partition(".lora_")[0].removeprefix("base_model.model.") for key in state_dict if ".lora_" in key
            }
            kept = [name for name in layers if name in saved]
            if kept and saved <= adapted_layers(tuner.model, adapter_name).keys() and len(kept) < len(layers):
                warnings.warn(
                    f"The weights to load have {len(kept)} of the {len(layers)} modules of adapter {adapter_name!r}: they "
                    "were saved after pruning, so the adapter is pruned to these modules.",
                    stacklevel=2,
                )
                tuner.prune_modules(FanLoraSetting.from_modules(tuner.model, kept), adapter_name=adapter_name)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)

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
        lora_layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
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
        if any(hasattr(factor, "device_mesh") for layer in layers.values() for factor in factors(layer, adapter_name)):
            raise ValueError(
                f"The weights of adapter {adapter_name!r} are sharded over processes, as by FSDP, which neither lets its "
                "parts run alone nor parameters go. Save the adapter, load it in a single process, score and prune it "
                "there, and begin the next run from what that saves."
            )
        return layers


def _disagreement(tuner: FanLoraModel, config: FanLoraConfig, model: nn.Module, setting: FanLoraSetting) -> str | None:
    """Returns a candidate that `target_modules` adapts and the setting does not, or the other way round."""
    targeted = {name for name in candidates(model) if tuner._check_target_module_exists(config, name)}
    return next(iter(sorted(targeted ^ set(setting.names))), None)


@contextmanager
def _inference_state(tuner: FanLoraModel, adapter_name: str) -> Iterator[None]:
    """The model in eval mode with one adapter active and no parameter to train, and everything as before afterwards."""
    training = [(module, module.training) for module in tuner.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    active = tuner.active_adapter
    devices = {parameter.device for parameter in tuner.parameters() if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            tuner.set_adapter(adapter_name)
            tuner.requires_grad_(False)
            tuner.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        tuner.set_adapter(active)
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad = flag


def _prepared(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Moves a batch to the model's device, and switches the KV cache off where the model has one.

    Raises:
        ValueError: the batch is no dict.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The dataloader gave a {type(batch).__name__} instead of a dict of the forward's arguments; use the data "
            "collator of your trainer. A single batch goes into a list: score_modules([batch])."
        )
    device = next(model.parameters()).device
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", False):
        moved.setdefault("use_cache", False)
    return moved
