"""PARA: vectors that are computed from the prompt once and scale Q, V and U for all tokens that follow."""

from typing import TYPE_CHECKING, Any

from ..registration import register
from .config import ParaConfig
from .core.generator import VectorGenerator
from .layer import ParaLayer
from .model import ParaModel


if TYPE_CHECKING:
    from .chat_template import get_prompt_end_token_ids
else:

    def __getattr__(name: str) -> Any:
        if name == "get_prompt_end_token_ids":
            from .chat_template import get_prompt_end_token_ids

            return get_prompt_end_token_ids
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["ParaConfig", "ParaLayer", "ParaModel", "VectorGenerator", "get_prompt_end_token_ids"]

register(name="para", config_cls=ParaConfig, model_cls=ParaModel, card="peft_fanlora.para.card:adapter_part")
