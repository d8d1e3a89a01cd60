"""Both methods on the same tiny models, so that one test serves the two."""

from pathlib import Path
from typing import Any

import torch
import transformers as tf
from para_models import CAUSAL, GREEDY, VOCAB, awaken, leading, tiny, tokens
from peft import PeftConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from peft_fanlora import FanLoraConfig, ParaConfig


__all__ = ["CAUSAL", "GREEDY", "METHODS", "VOCAB", "leading", "tiny", "tokens"]

METHODS = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}


def config_of(method: str, **fields: Any) -> PeftConfig:
    """Returns a configuration of rank 4."""
    return METHODS[method](**{"r": 4, "task_type": "CAUSAL_LM", **fields})


def wake(model: nn.Module, adapter: str = "default", seed: int = 1, size: float = 0.4) -> nn.Module:
    """Gives an adapter of either method random weights: a fresh one changes nothing, which hides every mistake."""
    awaken(model, adapter, seed, size)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and f".{adapter}" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    return model


def adapted(method: str, architecture: str = "llama", base: nn.Module | None = None, **fields: Any) -> PeftModel:
    """Returns a tiny model with an adapter that changes what it computes, in eval mode."""
    return wake(get_peft_model(tiny(architecture) if base is None else base, config_of(method, **fields))).eval()


def labelled(batch: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    """Returns labels that show where the prompt ends."""
    labels = batch.clone()
    labels[:, :prompt] = -100
    return labels


def logits(model: nn.Module, batch: torch.Tensor | None = None) -> torch.Tensor:
    """Returns the logits of a batch without a gradient."""
    with torch.no_grad():
        return model(input_ids=tokens() if batch is None else batch).logits


def generated(model: nn.Module, prompt: torch.Tensor | None = None, **kwargs: Any) -> list[list[int]]:
    """Generates six tokens for each row, greedily."""
    prompt = tokens() if prompt is None else prompt
    arguments = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, "min_new_tokens": 6, **kwargs}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments).tolist()


def saved_base(folder: Path, architecture: str = "llama", **overrides: Any) -> str:
    """Saves a tiny base model, and returns its folder."""
    tiny(architecture, **overrides).save_pretrained(folder / "base")
    return str(folder / "base")


def word_tokenizer() -> tf.PreTrainedTokenizerFast:
    """Makes a tokenizer of as many words as the tiny models know."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(VOCAB - 4))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients that a loss leaves on the trained parameters."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
