"""Adapter manager of a worker: replaces vLLM's LoRA manager and forwards LoRA adapters to it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from vllm.lora.layers import LoRAMapping
from vllm.lora.utils import get_adapter_absolute_path

from ..para.targets import DEFAULT_TARGETS, FUSED_PROJECTIONS
from . import compiled
from .layers import find_layers
from .layout import install
from .loading import load_tenant
from .tenants import TenantError, peft_type_of
from .vectors import Row, Tenant, Vectors


class ParaManager:
    """Loads and removes the adapters of a worker, and prepares the vectors for each step.

    Args:
        vllm_config: configuration of the engine.
        model: the loaded model.
        device: device of the model.
        lora: vLLM's manager for LoRA adapters; None if the engine serves only PARA.
    """

    def __init__(self, vllm_config: Any, model: nn.Module, device: torch.device, lora: Any = None) -> None:
        scheduler, config = vllm_config.scheduler_config, vllm_config.model_config
        self.lora = lora
        self.device = device
        self.capacity = vllm_config.lora_config.max_cpu_loras
        self.model_config = config.hf_config
        self.model_type = getattr(config.hf_config, "model_type", "")
        packed = {
            layer: modules
            for layer, modules in (getattr(model, "packed_modules_mapping", None) or {}).items()
            if (self.model_type, layer) not in FUSED_PROJECTIONS  # vLLM may list these as two modules
        }
        self.layout, modules = find_layers(model, packed, scheduler.max_num_seqs + 1, device)
        mapper = getattr(model, "hf_to_vllm_mapper", None)
        self._mapper = mapper.get_rename_mapper() if mapper is not None else None
        self.vectors = Vectors(self.layout.scaled, scheduler.max_num_seqs, scheduler.max_num_batched_tokens, device)
        self._reserve()
        compiled.register(vllm_config, self.layout, self.vectors)
        install(self.layout, modules, self.vectors, compiled.scale_layer)
        self._tenants: OrderedDict[tuple[int, str], Tenant] = OrderedDict()
        self._pinned: set[int] = set()

    def _reserve(self) -> None:
        """Allocates the tables of the default targets, so that vLLM includes them in its memory profile at startup."""
        targets = DEFAULT_TARGETS.get(self.model_type, [])
        for layer in self.layout.layers if isinstance(targets, list) else ():
            span = layer.span({part.module for part in layer.parts if part.module.rpartition(".")[2] in targets})
            if span is not None:
                layer.scaled.cover(*span)

    def _rename(self, module: str) -> str:
        """Returns vLLM's name of a module in transformers, or of a prefix of such a name."""
        if self._mapper is None or not module:
            return module
        (name,) = self._mapper.apply_list([module]) or [module]
        return name

    # Interface of vLLM's LoRA manager

    def add_adapter(self, request: Any) -> bool:
        """Loads an adapter unless it is loaded, or reloads it if the request has `load_inplace`.

        Returns:
            Whether the adapter is loaded.

        Raises:
            TenantError: the adapter cannot be served. An adapter that was loaded before is kept.
        """
        key = _key(request)
        if key not in self._tenants or request.load_inplace:
            folder = get_adapter_absolute_path(request.lora_path)
            if peft_type_of(folder) != "PARA":
                return self._add_lora(request, folder)
            tenant = load_tenant(folder, self.layout, self.model_config, self.device, self._rename)
            self.remove_adapter(request.lora_int_id)
            self._tenants[key] = tenant
        self._tenants.move_to_end(key)
        return True

    def _add_lora(self, request: Any, folder: str) -> bool:
        if self.lora is None:
            raise TenantError(
                f"{folder!r} is a {peft_type_of(folder)} adapter, but this engine serves only PARA: start it with "
                'additional_config={"para": {"lora": true}}.'
            )
        self._drop(request.lora_int_id)
        return bool(self.lora.add_adapter(request))

    def remove_adapter(self, adapter_id: int) -> bool:
        """Removes an adapter and returns whether it was loaded. Its running requests keep their vectors."""
        found = self._drop(adapter_id)
        return bool(self.lora is not None and self.lora.remove_adapter(adapter_id)) or found

    def _drop(self, adapter_id: int) -> bool:
        keys = [key for key in self._tenants if key[0] == adapter_id]
        for key in keys:
            del self._tenants[key]
        self._pinned.discard(adapter_id)
        return bool(keys)

    def remove_all_adapters(self) -> None:
        """Removes all adapters."""
        self._tenants.clear()
        self._pinned.clear()
        if self.lora is not None:
            self.lora.remove_all_adapters()

    def list_adapters(self) -> set[int]:
        """Returns the ids of the loaded PARA and LoRA adapters."""
        ids = {adapter_id for adapter_id, _ in self._tenants}
        return ids if self.lora is None else ids | self.lora.list_adapters()

    def pin_adapter(self, adapter_id: int) -> bool:
        """Excludes an adapter from eviction and returns whether it is loaded."""
        if any(key[0] == adapter_id for key in self._tenants):
            self._pinned.add(adapter_id)
            return True
        return bool(self.lora is not None and self.lora.pin_adapter(adapter_id))

    def set_active_adapters(self, requests: set[Any], mapping: Any) -> None:
        """Prepares a warm-up step, which has no requests."""
        self.vectors.begin_without_requests()
        if self.lora is not None:
            self.lora.set_active_adapters(requests, mapping)

    def add_dummy_lora(self, request: Any, rank: int) -> bool:
        """Adds a dummy LoRA adapter for vLLM's warm-up; PARA needs none."""
        return self.lora is None or bool(self.lora.add_dummy_lora(request, rank=rank))

    def dummy_lora_cache(self) -> Any:
        """Returns the context manager in which vLLM creates dummy LoRA adapters."""
        return nullcontext() if self.lora is None else self.lora.dummy_lora_cache()

    def get_dummy_lora_warmup_rank(self, default_rank: int) -> int:
        """Returns the rank of the dummy LoRA adapters."""
        return default_rank if self.lora is None else int(self.lora.get_dummy_lora_warmup_rank(default_rank))

    def supports_tower_connector_lora(self) -> bool:
        """Returns whether LoRA adapters apply to the vision tower and the connector."""
        return self.lora is not None and bool(self.lora.supports_tower_connector_lora())

    # Interface for the model runners

    def tenant(self, request: Any) -> Tenant | None:
        """Returns the PARA adapter of a `LoRARequest`, loaded at its first use; None for LoRA and the base model."""
        if request is None:
            return None
        key = _key(request)
        if key not in self._tenants:
            if self.lora is not None and request.lora_int_id in self.lora.list_adapters():
                return None
            self.add_adapter(request)
            if key not in self._tenants:
                return None
        self._tenants.move_to_end(key)
        return self._tenants[key]

    def lora_inputs(
        self, of_samples: Sequence[int], of_tokens: Sequence[int], requests: set[Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...], set[Any]] | None:
        """Returns the LoRA mapping of a step without the PARA adapters; None if the engine serves only PARA.

        Args:
            of_samples: adapter id of each sampled token, 0 for the base model.
            of_tokens: adapter id of each token.
            requests: the `LoRARequest`s of the step.

        Returns:
            The same three, with 0 in place of PARA adapters.
        """
        if self.lora is None:
            return None
        requests = {request for request in requests if self.tenant(request) is None}
        ids = {request.lora_int_id for request in requests}
        return (
            tuple(int(adapter) if adapter in ids else 0 for adapter in of_samples),
            tuple(int(adapter) if adapter in ids else 0 for adapter in of_tokens),
            requests,
        )

    def begin(self, rows: Sequence[Row], lora: tuple[Sequence[int], Sequence[int], set[Any]] | None = None) -> None:
        """Prepares the vectors and the LoRA adapters for a step, and evicts adapters beyond `max_cpu_loras`.

        Args:
            rows: the requests of the step, in the order of its tokens.
            lora: the result of `lora_inputs`.
        """
        self.vectors.begin(rows)
        self._forget_least_recently_used()
        if self.lora is not None and lora is not None:
            sampled, tokens, requests = lora
            self.lora.set_active_adapters(requests, LoRAMapping(tokens, sampled, is_prefill=True))

    def _forget_least_recently_used(self) -> None:
        for key in list(self._tenants)[: max(len(self._tenants) - self.capacity, 0)]:
            if key[0] not in self._pinned:
                del self._tenants[key]


def _key(request: Any) -> tuple[int, str]:
    return request.lora_int_id, request.lora_path
