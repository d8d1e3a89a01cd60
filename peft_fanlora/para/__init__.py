"""PARA: vectors that a prompt makes once, and that scale Q, V and U for every token after it."""

from peft_fanlora.para.chat_template import prompt_end_token_ids_of
from peft_fanlora.para.config import ParaConfig
from peft_fanlora.para.generator import VectorGenerator
from peft_fanlora.para.layer import ParaLayer
from peft_fanlora.para.model import ParaModel
from peft_fanlora.registration import register


__all__ = ["ParaConfig", "ParaLayer", "ParaModel", "VectorGenerator", "prompt_end_token_ids_of"]

register(name="para", config_cls=ParaConfig, model_cls=ParaModel)
