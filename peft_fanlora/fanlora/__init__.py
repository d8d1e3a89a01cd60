"""FanLoRA: LoRA on the most critical modules of each layer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from ..registration import register
from ..sharing.saving import add_card
from .config import FanLoraConfig
from .model import FanLoraModel
from .setting import FanLoraSetting


if TYPE_CHECKING:
    from .callback import FanLoraCallback
    from .cost_measurement import module_costs
    from .costs import ModuleCosts
    from .export import export_lora
    from .scores import ImportanceScores
else:
    _AT_FIRST_USE = {
        "FanLoraCallback": "callback",
        "ImportanceScores": "scores",
        "ModuleCosts": "costs",
        "export_lora": "export",
        "module_costs": "cost_measurement",
    }

    def __getattr__(name: str) -> Any:
        """Imports the other names on first use: transformers' Trainer alone imports 500 modules."""
        if name in _AT_FIRST_USE:
            return getattr(import_module(f".{_AT_FIRST_USE[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "FanLoraCallback",
    "FanLoraConfig",
    "FanLoraModel",
    "FanLoraSetting",
    "ImportanceScores",
    "ModuleCosts",
    "export_lora",
    "module_costs",
]

register(
    name="fanlora", config_cls=FanLoraConfig, model_cls=FanLoraModel, card="peft_fanlora.fanlora.card:adapter_part"
)
add_card(FanLoraSetting, "peft_fanlora.fanlora.card:setting_part")
# FanLoRA adapters can be hot-swapped like LoRA adapters, with the same checks.
CONFIG_KEYS_TO_CHECK[PeftType["FANLORA"]] = CONFIG_KEYS_TO_CHECK[PeftType.LORA]
