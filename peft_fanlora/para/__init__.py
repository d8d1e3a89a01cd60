"""PARA: vectors that are computed from the prompt once and scale Q, V and U for all tokens that follow."""

from ..registration import register
from .chat_template import get_prompt_end_token_ids
from .config import ParaConfig
from .core.generator import VectorGenerator
from .layer import ParaLayer
from .model import ParaModel


__all__ = ["ParaConfig", "ParaLayer", "ParaModel", "VectorGenerator", "get_prompt_end_token_ids"]

register(name="para", config_cls=ParaConfig, model_cls=ParaModel, card="peft_fanlora.para.card:adapter_part")
