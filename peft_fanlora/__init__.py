"""FanLoRA and PARA for Hugging Face PEFT: fine-tuning methods for serving many tenants on one base model.

Importing this package imports PEFT and registers both methods with it, saves their adapters with a model card, and
checks adapters when they are loaded. In the processes of vLLM and of the command line, PEFT is imported at first use
instead, and the methods are registered then. Modules for training and scoring are always imported at first use.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__


if TYPE_CHECKING:
    from .fanlora.callback import FanLoraCallback
    from .fanlora.config import FanLoraConfig
    from .fanlora.cost_measurement import module_costs
    from .fanlora.costs import ModuleCosts
    from .fanlora.export import export_lora
    from .fanlora.model import FanLoraModel
    from .fanlora.scores import ImportanceScores
    from .fanlora.setting import FanLoraSetting
    from .para.chat_template import get_prompt_end_token_ids
    from .para.config import ParaConfig
    from .para.model import ParaModel
    from .serving.tenants import load_tenant
else:
    _MODULES = {
        "FanLoraCallback": "fanlora.callback",
        "FanLoraConfig": "fanlora.config",
        "FanLoraModel": "fanlora.model",
        "FanLoraSetting": "fanlora.setting",
        "ImportanceScores": "fanlora.scores",
        "ModuleCosts": "fanlora.costs",
        "ParaConfig": "para.config",
        "ParaModel": "para.model",
        "export_lora": "fanlora.export",
        "get_prompt_end_token_ids": "para.chat_template",
        "load_tenant": "serving.tenants",
        "module_costs": "fanlora.cost_measurement",
    }

    def __getattr__(name: str) -> Any:
        """Imports the module of a public name at first use (PEP 562), after PEFT and the methods."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        import_module("peft")
        return getattr(import_module(f".{_MODULES[name]}", __name__), name)


__all__ = [
    "FanLoraCallback",
    "FanLoraConfig",
    "FanLoraModel",
    "FanLoraSetting",
    "ImportanceScores",
    "ModuleCosts",
    "ParaConfig",
    "ParaModel",
    "export_lora",
    "get_prompt_end_token_ids",
    "load_tenant",
    "module_costs",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _register_methods(peft: ModuleType) -> None:
    """Registers both methods, once PEFT has been imported."""
    from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

    from .fanlora.config import FanLoraConfig
    from .fanlora.model import FanLoraModel
    from .fanlora.setting import FanLoraSetting
    from .para.config import ParaConfig
    from .para.model import ParaModel
    from .registration import register
    from .serving.loading import load_as_saved
    from .sharing.saving import add_card, write_cards

    cards = "peft_fanlora.fanlora.card"
    register(name="fanlora", config_cls=FanLoraConfig, model_cls=FanLoraModel, card=f"{cards}:adapter_part")
    add_card(FanLoraSetting, f"{cards}:setting_part")
    register(name="para", config_cls=ParaConfig, model_cls=ParaModel, card="peft_fanlora.para.card:adapter_part")
    # FanLoRA adapters can be hot-swapped like LoRA adapters, with the same checks.
    CONFIG_KEYS_TO_CHECK[peft.PeftType["FANLORA"]] = CONFIG_KEYS_TO_CHECK[peft.PeftType.LORA]
    load_as_saved()
    write_cards()


if {"vllm", "peft_fanlora_cli"} & sys.modules.keys():
    import_module("wrapt").register_post_import_hook(_register_methods, "peft")
else:
    _register_methods(import_module("peft"))
