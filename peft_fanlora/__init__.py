"""FanLoRA and PARA for Hugging Face PEFT: fine-tuning methods for serving many tenants on one base model.

Importing this package registers both methods with PEFT, saves their adapters with a model card, and checks adapters
when they are loaded. Modules for training and scoring are imported at first use.
"""

from typing import TYPE_CHECKING, Any

from . import fanlora, para
from .fanlora import FanLoraConfig, FanLoraModel, FanLoraSetting
from .para import ParaConfig, ParaModel
from .serving.loading import load_as_saved
from .serving.tenants import load_tenant
from .sharing.saving import write_cards
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .fanlora import FanLoraCallback, ImportanceScores, ModuleCosts, export_lora, module_costs
    from .para import get_prompt_end_token_ids
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(fanlora if name in fanlora.__all__ else para, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


load_as_saved()
write_cards()

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
