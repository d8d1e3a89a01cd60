"""FanLoRA and PARA for Hugging Face PEFT: fine-tuning for one backbone that serves many tenants.

Importing this package registers both methods with PEFT, and lets their adapters be saved with a model card
and loaded as they were saved. What training and scoring need beyond that is loaded at first use.
"""

from typing import TYPE_CHECKING, Any

from . import fanlora
from .fanlora import FanLoraConfig, FanLoraModel, FanLoraSetting
from .para import ParaConfig, ParaModel, get_prompt_end_token_ids
from .serving.loading import load_as_saved
from .serving.tenants import load_tenant
from .sharing.saving import write_cards
from .version import __version__ as __version__


if TYPE_CHECKING:
    from .fanlora import FanLoraCallback, ImportanceScores, export_lora
else:

    def __getattr__(name: str) -> Any:
        if name in __all__:
            return getattr(fanlora, name)
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
    "ParaConfig",
    "ParaModel",
    "export_lora",
    "get_prompt_end_token_ids",
    "load_tenant",
]
