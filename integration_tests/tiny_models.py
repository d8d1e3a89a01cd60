"""Tiny models of several architectures, made from a configuration, with data to match."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_fanlora import FanLoraConfig


VOCAB = 64


@dataclass(frozen=True)
class Tiny:
    """An architecture at toy size."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    task_type: str = "CAUSAL_LM"
    num_modules: int = 0
    """How many linear layers FanLoRA chooses among."""
    others: frozenset[str] = frozenset()
    """The linear layers outside the blocks that "all-linear" adapts as well."""
    labels: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.clone)

    def base(self, **overrides: Any) -> nn.Module:
        """Makes the model, always with the same weights."""
        torch.manual_seed(0)
        config = getattr(transformers, self.config_class)(**{**self.config, **overrides})
        return getattr(transformers, self.model_class)(config).eval()

    def batch(self, rows: int = 3, tokens: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
        """Makes a batch with padding on the right and labels."""
        generator = torch.Generator().manual_seed(seed)
        input_ids = torch.randint(3, VOCAB, (rows, tokens), generator=generator)
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, -2:] = 0
        labels = self.labels(input_ids)
        if labels.shape == input_ids.shape:
            labels = labels.masked_fill(attention_mask == 0, -100)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


_DECODER = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}

TINY = {
    "llama": Tiny("LlamaForCausalLM", "LlamaConfig", _DECODER, num_modules=21),
    "qwen2": Tiny("Qwen2ForCausalLM", "Qwen2Config", _DECODER, num_modules=21),
    "gemma": Tiny("GemmaForCausalLM", "GemmaConfig", {**_DECODER, "head_dim": 4}, num_modules=21),
    "gpt2": Tiny(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCAB, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2},
        num_modules=12,
    ),
    "opt": Tiny(
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 16, "pad_token_id": 0},
        num_modules=18,
    ),
    "t5": Tiny(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCAB, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        | {"decoder_start_token_id": 0, "pad_token_id": 0, "feed_forward_proj": "gated-gelu"},
        task_type="SEQ_2_SEQ_LM",
        num_modules=2 * 7 + 2 * 11,
        labels=lambda input_ids: input_ids.flip(1)[:, :5].contiguous(),
    ),
    "bert": Tiny(
        "BertForSequenceClassification",
        "BertConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3},
        task_type="SEQ_CLS",
        num_modules=18,
        others=frozenset({"bert.pooler.dense"}),
        labels=lambda input_ids: input_ids[:, 0] % 3,
    ),
}


def randomize(model: nn.Module, *, std: float = 0.5, seed: int = 1) -> None:
    """Gives every adapter parameter random values, as training would: a fresh adapter changes nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * std


def adapted(name: str = "llama", *, base: nn.Module | None = None, **config: Any) -> PeftModel:
    """Makes a tiny model with a FanLoRA adapter that changes its output."""
    tiny = TINY[name]
    config = {"r": 4, "task_type": tiny.task_type, **config}
    model = get_peft_model(tiny.base() if base is None else base, FanLoraConfig(**config))
    randomize(model)
    return model.eval()


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns the model's output without a gradient."""
    with torch.no_grad():
        return model(**batch).logits


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Makes a tokenizer of a few words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", ":", *(f"w{index}" for index in range(VOCAB - 7))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = (
        "{% for message in messages %}{{ message['role'] + ' : ' + message['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
    )
    return made


def sentences(rows: int, seed: int = 0) -> list[str]:
    """Makes text in which each word is followed by its successor, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCAB - 20, (rows,), generator=generator).tolist()
    return [" ".join(f"w{start + step}" for step in range(8)) for start in starts]
