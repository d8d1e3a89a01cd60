"""A tiny chat model for the examples: SmolLM2's chat template, a few tokens, and next to no weights."""

from pathlib import Path
from typing import Any

import assets
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from integration_tests.helpers.models import LLAMA


VOCAB_SIZE = 2_000
"""SmolLM2's own 49,152 tokens would make the logits the most of the work."""


def save_tiny_chat_model(folder: Path, **config: Any) -> None:
    """Writes the model and its tokenizer."""
    texts = [message["content"] for row in assets.glosses()[:2_000] for part in row.values() for message in part]
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder()).train_new_from_iterator(texts, VOCAB_SIZE)
    tokenizer.save_pretrained(folder)
    config = {**LLAMA, "vocab_size": len(tokenizer), "max_position_embeddings": 256, **config}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
