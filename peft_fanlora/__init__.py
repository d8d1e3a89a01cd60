"""FanLoRA and PARA for Hugging Face PEFT: fine-tuning for one backbone that serves many tenants.

Importing this package registers both methods with PEFT.
"""

from peft_fanlora.para import ParaConfig, ParaModel, prompt_end_token_ids_of


__all__ = ["ParaConfig", "ParaModel", "prompt_end_token_ids_of"]

__version__ = "0.1.0.dev0"
