"""Extends `PeftModel.load_adapter` for adapters of this package.

PEFT loads weights by name into an existing adapter, and does not report weights that do not fit. Importing this
package wraps that method of `PeftModel`; models without a FanLoRA or PARA adapter are not affected.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel

from .tenants import TenantMixin


def load_as_saved() -> None:
    """Wraps `PeftModel.load_adapter`, so that adapters load as saved or not at all; repeated calls have no effect."""
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
    """Adds an adapter like `load_adapter`, but with another configuration than the saved one."""
    is_trainable = given.get("is_trainable", False)
    config.inference_mode = not is_trainable
    options = {name: given[name] for name in ("low_cpu_mem_usage", "autocast_adapter_dtype") if name in given}
    model.add_adapter(adapter_name, config, **options)
    if is_trainable:
        model.set_requires_grad(adapter_name)
