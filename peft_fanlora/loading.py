"""Loading saved adapters: what this package adds to `load_adapter`.

PEFT loads weights by name into the adapter that is there, and says nothing of those that have no place. Importing this
package wraps that one method of `PeftModel`. Models without a FanLoRA or PARA adapter pass through as they do in PEFT.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME

from .fanlora.model import FanLoraModel
from .fanlora.modules import lora_modules
from .tenants import ServesTenants


def load_as_saved() -> None:
    """Lets `PeftModel` load our adapters as they were saved, or not at all; to do so again does nothing."""
    wrapped: Any = PeftModel
    if not hasattr(wrapped.load_adapter, "loads_as_saved"):
        wrapped.load_adapter = _loading(wrapped.load_adapter)


def _loading(load_adapter: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_adapter)
    def load_as_saved(self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self.base_model, ServesTenants):
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        is_new = adapter_name not in self.peft_config
        if not is_new and isinstance(self.base_model, FanLoraModel):
            _prune_as_saved(self, model_id, adapter_name, kwargs)
        try:
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        except Exception:
            if is_new and adapter_name in self.peft_config:
                self.delete_adapter(adapter_name)
            raise

    load_as_saved.loads_as_saved = True  # type: ignore[attr-defined]
    return load_as_saved


def _prune_as_saved(model: PeftModel, model_id: Any, adapter_name: str, kwargs: dict[str, Any]) -> None:
    """Prunes an adapter to the setting of the saved one that is about to be loaded over it.

    A trainer resumes by loading a checkpoint over the adapter that the script has just made, on all modules. If the
    checkpoint was saved after pruning, its modules are fewer, and the others would stay in the model untrained.
    """
    download_kwargs, _ = model._split_kwargs(dict(kwargs))
    folder = Path(model_id, download_kwargs.get("subfolder") or "")
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        return
    setting = getattr(PeftConfig.from_pretrained(str(model_id), **download_kwargs), "setting", None)
    tuner: Any = model.base_model
    modules = lora_modules(tuner.model, adapter_name)
    if setting is not None and set(setting.resolve(tuner.model).names) != modules.keys():
        warnings.warn(
            f"{model_id} was saved after pruning, with {len(setting.kept)} of the {len(modules)} modules of adapter "
            f"{adapter_name!r}: the adapter is pruned to these modules.",
            stacklevel=3,
        )
        tuner.prune_modules(setting, adapter_name=adapter_name)
