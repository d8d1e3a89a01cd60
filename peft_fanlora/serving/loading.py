"""Loading saved adapters: what this package adds to `load_adapter`.

PEFT loads weights by name into the adapter that is there, and says nothing of those that have no place. Importing this
package wraps that one method of `PeftModel`. Models without a FanLoRA or PARA adapter pass through as they do in PEFT.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel

from .tenants import TenantMixin


def load_as_saved() -> None:
    """Lets `PeftModel` load our adapters as they were saved, or not at all; to do so again does nothing."""
    wrapped: Any = PeftModel
    if not hasattr(wrapped.load_adapter, "loads_as_saved"):
        wrapped.load_adapter = _loading(wrapped.load_adapter)


def _loading(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(load_adapter)

    @functools.wraps(load_adapter)
    def load_as_saved(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, TenantMixin):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        is_new = adapter_name not in self.peft_config
        download_kwargs, _ = self._split_kwargs(dict(kwargs))
        try:
            if not is_new:
                self.base_model.prepare_for_weights(adapter_name, model_id, download_kwargs)
            elif (config := self.base_model.config_to_join(model_id, download_kwargs)) is not None:
                given = signature.bind(self, model_id, adapter_name, *args, **kwargs).arguments
                _add(self, adapter_name, config, given)
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        except Exception:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    load_as_saved.loads_as_saved = True  # type: ignore[attr-defined]
    return load_as_saved


def _add(model: PeftModel, adapter_name: str, config: PeftConfig, given: dict[str, Any]) -> None:
    """Adds an adapter as `load_adapter` does, but by another configuration than the saved one."""
    is_trainable = given.get("is_trainable", False)
    config.inference_mode = not is_trainable
    options = {name: given[name] for name in ("low_cpu_mem_usage", "autocast_adapter_dtype") if name in given}
    model.add_adapter(adapter_name, config, **options)
    if is_trainable:
        model.set_requires_grad(adapter_name)
