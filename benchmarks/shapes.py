"""The base models of the benchmarks: SmolLM2, or random weights in a Llama shape, which need no download."""

import sys
from enum import StrEnum
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig


sys.path.append(str(Path(__file__).parent.parent / "examples"))
import assets


_SHAPES = {
    "tiny": {
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    "1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}


class Shape(StrEnum):
    """Values of `--shape`: SmolLM2-135M's weights, or random weights in its shape, Llama-3.2-1B's or LLaMA-2-7B's.

    The tiny shape is for tests.
    """

    smollm2 = "smollm2"
    tiny = "tiny"
    m135 = "135m"
    b1 = "1b"
    b7 = "7b"


def load(shape: Shape, model: str, device: str, dtype: torch.dtype) -> nn.Module:
    """Returns the base model.

    Args:
        shape: SmolLM2, or the shape of random weights.
        model: folder or Hub id, instead of a shape.
        device: device of the model, on which random weights are created.
        dtype: dtype of the weights.
    """
    if model or shape is Shape.smollm2:
        return AutoModelForCausalLM.from_pretrained(model or assets.model_folder(), dtype=dtype).to(device).eval()
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**_SHAPES[shape.value]), dtype=dtype).eval()
