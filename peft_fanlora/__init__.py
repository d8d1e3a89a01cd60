"""FanLoRA and PARA for Hugging Face PEFT: fine-tuning for one backbone that serves many tenants.

Importing this package registers both methods with PEFT, and lets their adapters be saved with a model card
and loaded as they were saved.
"""

from .fanlora import FanLoraCallback, FanLoraConfig, FanLoraModel, FanLoraSetting, ImportanceScores, export_lora
from .loading import load_as_saved
from .para import ParaConfig, ParaModel, get_prompt_end_token_ids
from .sharing import write_cards
from .tenants import load_tenant


load_as_saved()
write_cards()

__version__ = "0.1.0.dev0"

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
