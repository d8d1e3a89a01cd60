"""FanLoRA: LoRA on the most critical modules of each layer."""

from peft import PeftType
from peft.utils.hotswap import CONFIG_KEYS_TO_CHECK

from ..registration import register
from .callback import FanLoraCallback
from .config import FanLoraConfig
from .export import export_lora
from .model import FanLoraModel
from .scores import ImportanceScores
from .setting import FanLoraSetting


__all__ = ["FanLoraCallback", "FanLoraConfig", "FanLoraModel", "FanLoraSetting", "ImportanceScores", "export_lora"]

register(name="fanlora", config_cls=FanLoraConfig, model_cls=FanLoraModel)
# FanLoRA's adapters are swapped as LoRA's are, and what LoRA compares before it swaps two is what matters here as well.
CONFIG_KEYS_TO_CHECK[PeftType["FANLORA"]] = CONFIG_KEYS_TO_CHECK[PeftType.LORA]
