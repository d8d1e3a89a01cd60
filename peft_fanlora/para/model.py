"""The PARA tuner, which adds the layers and hooks to a model and removes them.

Modules that are only needed at run time are imported in the functions that use them, to keep the import fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..serving.tenants import TenantMixin, adapted_modules, changing
from .blocks import ParaBlocks
from .layer import MERGE_REFUSAL, ParaLayer, ParaLinear
from .state import Vectors
from .targets import DEFAULT_TARGETS, linear_shape, scaled_outputs


if TYPE_CHECKING:
    from ..serving.continuous_batching import Request


class ParaModel(TenantMixin, BaseTuner):
    """Adapts a model with prompt-aware representation adjustment (PARA, arXiv 2502.01033).

    In each Transformer block a generator pools the hidden states of the prompt and computes a vector for each target,
    l = 1 + up(act(down(pool(h)))), which scales the target's outputs: Q' = l_q ⊙ Q, V' = l_v ⊙ V and U' = l_u ⊙ U [S].
    The vectors are computed in the first pass of the prompt and stored with its KV cache [S].

    Args:
        model: the model to adapt.
        peft_config: the configuration, or a dict of configurations by adapter name.
        adapter_name: the name of the adapter.
        low_cpu_mem_usage: whether to create the new parameters on the meta device, to be loaded later.

    Examples:
        >>> import peft_fanlora
        >>> model = get_peft_model(base, ParaConfig(r=12, task_type="CAUSAL_LM"))
    """

    prefix = "para_"
    makes_vectors = True
    tuner_layer_cls = ParaLayer
    target_module_mapping: dict[str, Any] = DEFAULT_TARGETS

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Adds an adapter to the model. If it fails, the model is unchanged.

        Args:
            model: the model to adapt.
            adapter_name: the name of the adapter, whose configuration the tuner already has.
            autocast_adapter_dtype: see PEFT.
            low_cpu_mem_usage: whether to create the new parameters on the meta device, to be loaded later.
            state_dict: ignored. Most target layers have no parameters, so that the keys of a checkpoint do not tell
                which layers are adapted; the configuration does.

        Raises:
            ValueError: the configuration does not fit the model.
            TypeError: a target module is not linear.
        """
        from ..serving.adapters import require_usable_names, taken_back
        from ..serving.named_rows import NamedRows
        from .hooks import CallHooks

        with changing(self.call_gate, model, adapter_name):
            known = any(adapter_name in layer.para_target for layer in _para_layers(model))
            with taken_back(self, model, adapter_name, is_known=known):
                if not known:
                    require_usable_names(model, adapter_name, self.peft_config, _part_names(self.peft_config))
                self._check_targets(model, adapter_name)
                self._blocks = _blocks_of(model)
                super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)
            CallHooks.of(model, self._blocks).install()
            whole = (module for module in adapted_modules(model) if isinstance(module, AuxiliaryTrainingWrapper))
            NamedRows(self._blocks.names_for).install(whole)
            self.continuous_batching.install()

    def _check_targets(self, model: nn.Module, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        inside = tuple(name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
        for name, module in model.named_modules():
            if not name or name.startswith(inside) or isinstance(module, ParaLayer):
                continue
            if self._check_target_module_exists(config, name):
                _, outputs = linear_shape(module)
                scaled_outputs(getattr(model, "config", None), name, outputs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> PeftConfig:
        if peft_config.target_modules is None and model_config.get("model_type") not in self.target_module_mapping:
            raise ValueError(
                f"Please specify `target_modules`: PARA has no default target modules for the architecture "
                f"{model_config.get('model_type')!r}. Name its query, value and up projections, such as "
                "ParaConfig(target_modules=['q_proj', 'v_proj', 'up_proj'])."
            )
        return super()._prepare_adapter_config(peft_config, model_config)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        from ..serving.rows import containers

        if isinstance(target, ParaLayer):
            target.update_layer(adapter_name, peft_config)
            return
        block = self._blocks.block_of(current_key, self.model)
        slices = scaled_outputs(getattr(self.model, "config", None), current_key, linear_shape(target)[1])
        layer = ParaLinear(target, current_key, block, slices, is_expert=containers(self.model, current_key) > 1)
        layer.update_layer(adapter_name, peft_config)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if hasattr(new_module, "base_layer"):
            super()._replace_module(parent, child_name, new_module, child)
        else:
            # The restored module has its weights. PEFT would assign them again, which fails if an output layer is tied
            # to embeddings with trained new tokens.
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Applies to each row of the calls in this context the adapter given by `adapter_names`.

        Raises:
            ValueError: the model is in training mode, or an adapter does not exist.
        """
        names = kwargs.get("adapter_names")
        with (
            self.calling(kwargs),
            nullcontext() if names is None else self._blocks.state.mixing(self.row_names(names)),
        ):
            yield

    def names_of_thread(self) -> tuple[str, ...] | None:
        """Returns the adapter of each row of the current thread's mixed batch; None outside of one."""
        return self._blocks.state.rows

    @contextmanager
    def decoding(self, requests: Sequence[Request], kept: dict[str, Vectors]) -> Iterator[None]:
        """Applies the vectors of each request to its tokens in a packed row, and stores those that are new."""
        from .packed import PackedStep

        step = PackedStep(requests, kept)
        with self._blocks.state.decoding(step):
            yield
        step.keep_vectors()

    def find_rows(self) -> None:
        """Does nothing, since the layers see a single packed row."""

    def _check_merge_allowed(self) -> None:
        raise NotImplementedError(MERGE_REFUSAL)

    def unload(self) -> nn.Module:
        """Returns the base model without the adapters and their hooks."""
        from .hooks import CallHooks

        model = super().unload()
        CallHooks.of(model, self._blocks).remove()
        self.continuous_batching.remove()
        return model

    @classmethod
    def _follow_renamed_modules(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # PEFT only renames LoRA tensors, so it gets one placeholder LoRA tensor per module.
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

        modules = list(dict.fromkeys(key.partition(".para_")[0] for key in state_dict if ".para_" in key))
        shown = {f"{module}.lora_A.weight": torch.tensor(index) for index, module in enumerate(modules)}
        found = convert_peft_adapter_state_dict_for_transformers(model, LoraConfig(), shown, adapter_name=adapter_name)
        renamed = {modules[int(index)]: key.removesuffix(".lora_A.weight") for key, index in found.items()}
        parts = ((key.partition(".para_"), tensor) for key, tensor in state_dict.items())
        return {renamed.get(module, module) + dot + rest: tensor for (module, dot, rest), tensor in parts}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".para_generator.{adapter_name}.", ".para_generator.")


def _part_names(adapter_names: Iterable[str]) -> set[str]:
    """Returns the names of the submodules and parameters of PARA layers; up-projections are `up_` plus the target."""
    return {
        "para_generator",
        "down",
        "query",
        "activation",
        *(name for name in adapter_names if name.startswith("up_")),
    }


def _para_layers(model: nn.Module) -> Iterator[ParaLayer]:
    return (module for module in adapted_modules(model) if isinstance(module, ParaLayer))


def _blocks_of(model: nn.Module) -> ParaBlocks:
    """Returns the blocks of an adapted model, or new ones."""
    return next((layer.block.blocks for layer in _para_layers(model)), None) or ParaBlocks()
