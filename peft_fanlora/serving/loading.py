"""Loading saved adapters: what this package adds to `load_adapter`.

PEFT loads weights by name into the adapter that is there, and says nothing of those that have no place. Importing this
package wraps that one method of `PeftModel`. Models without a FanLoRA or PARA adapter pass through as they do in PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft import PeftModel

from .tenants import TenantMixin


def load_as_saved() -> None:
    """Lets `PeftModel` load our adapters as they were saved, or not at all; to do so again does nothing."""
    wrapped: Any = PeftModel
    if not hasattr(wrapped.load_adapter, "loads_as_saved"):
        wrapped.load_adapter = _loading(wrapped.load_adapter)


def _loading(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_adapter)
    def load_as_saved(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, TenantMixin):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        is_new = adapter_name not in self.peft_config
        if not is_new:
            download_kwargs, _ = self._split_kwargs(dict(kwargs))
            self.base_model.prepare_for_weights(adapter_name, model_id, download_kwargs)
        try:
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        except Exception:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    load_as_saved.loads_as_saved = True  # type: ignore[attr-defined]
    return load_as_saved
