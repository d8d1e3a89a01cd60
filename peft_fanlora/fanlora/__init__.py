"""FanLoRA: LoRA on the most critical modules of each layer."""

from ..registration import register
from .callback import FanLoraCallback
from .config import FanLoraConfig
from .export import export_lora
from .model import FanLoraModel
from .scores import ImportanceScores
from .setting import FanLoraSetting


__all__ = ["FanLoraCallback", "FanLoraConfig", "FanLoraModel", "FanLoraSetting", "ImportanceScores", "export_lora"]

register(name="fanlora", config_cls=FanLoraConfig, model_cls=FanLoraModel)
