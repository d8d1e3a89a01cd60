"""PARA: vectors that a prompt makes once, and that scale Q, V and U for every token after it."""

from ..registration import register
from .chat_template import prompt_end_token_ids_of
from .config import ParaConfig
from .generator import VectorGenerator
from .layer import ParaLayer
from .model import ParaModel


__all__ = ["ParaConfig", "ParaLayer", "ParaModel", "VectorGenerator", "prompt_end_token_ids_of"]

register(name="para", config_cls=ParaConfig, model_cls=ParaModel, card="peft_fanlora.para.card:adapter_part")
