"""Tiny models of many architectures, made from a configuration, and adapters of both methods that change their output.

A fresh adapter is the identity, which hides every mistake: `randomize` gives it random weights, as training would.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_fanlora import FanLoraConfig, ParaConfig
from peft_fanlora.para.layer import ParaLayer


METHODS: dict[str, type[FanLoraConfig] | type[ParaConfig]] = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}

VOCAB = 64
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**IDS, **SIZES, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 128}
GPT2 = {**IDS, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 128}
BERT = {**SIZES, "vocab_size": VOCAB, "pad_token_id": 0, "max_position_embeddings": 128}
ENCODER_DECODER = {
    **IDS,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}

CAUSAL = {
    "llama": (tf.LlamaConfig, LLAMA),
    "mistral": (tf.MistralConfig, {**LLAMA, "sliding_window": None}),
    "qwen2": (tf.Qwen2Config, LLAMA),
    "qwen3": (tf.Qwen3Config, LLAMA),
    "gemma": (tf.GemmaConfig, LLAMA),
    "gemma2": (tf.Gemma2Config, {**LLAMA, "query_pre_attn_scalar": 8}),
    "gemma3_text": (tf.Gemma3TextConfig, {**LLAMA, "query_pre_attn_scalar": 8, "sliding_window": 8}),
    "phi": (tf.PhiConfig, {key: value for key, value in LLAMA.items() if key != "head_dim"}),
    "phi3": (tf.Phi3Config, {**LLAMA, "original_max_position_embeddings": 128}),
    "olmo": (tf.OlmoConfig, LLAMA),
    "olmo2": (tf.Olmo2Config, LLAMA),
    "gpt2": (tf.GPT2Config, GPT2),
    "gptj": (tf.GPTJConfig, {**GPT2, "rotary_dim": 4}),
    "gpt_neox": (tf.GPTNeoXConfig, {**BERT, **IDS, "rotary_pct": 0.5}),
    "opt": (tf.OPTConfig, {**BERT, **IDS, "ffn_dim": 24, "word_embed_proj_dim": 16}),
    "bloom": (tf.BloomConfig, {**IDS, "hidden_size": 16, "n_layer": 3, "n_head": 4}),
    "falcon": (
        tf.FalconConfig,
        {**IDS, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "alibi": False},
    ),
    "falcon_new": (
        tf.FalconConfig,
        {
            **IDS,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "mpt": (tf.MptConfig, {**IDS, "d_model": 16, "n_layers": 3, "n_heads": 4, "max_seq_len": 128}),
    "mixtral": (tf.MixtralConfig, {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {**LLAMA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
}
ENCODERS = {
    "bert": (tf.BertConfig, {**BERT, "num_labels": 3}),
    "roberta": (tf.RobertaConfig, BERT),
    "deberta": (tf.DebertaConfig, {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}),
    "deberta-v2": (
        tf.DebertaV2Config,
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "share_att_key": True,
            "position_buckets": 8,
        },
    ),
    "distilbert": (tf.DistilBertConfig, {**IDS, "dim": 16, "hidden_dim": 24, "n_layers": 3, "n_heads": 4}),
}
T5 = {**IDS, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
SEQ2SEQ = {
    "t5": (tf.T5Config, T5),
    "t5_gated": (tf.T5Config, {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": (tf.BartConfig, ENCODER_DECODER),
}


def tiny(name: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Returns a tiny model of an architecture, in eval mode, with weights that make a difference."""
    torch.manual_seed(seed)
    table, auto = next(
        (table, auto)
        for table, auto in (
            (CAUSAL, tf.AutoModelForCausalLM),
            (ENCODERS, tf.AutoModelForSequenceClassification),
            (SEQ2SEQ, tf.AutoModelForSeq2SeqLM),
        )
        if name in table
    )
    config_class, fields = table[name]
    model = auto.from_config(config_class(**{**fields, **overrides}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return enlarge(model).eval()


def enlarge(model: nn.Module) -> nn.Module:
    """Gives a model weights that are large enough for its layers to matter."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model


@dataclass(frozen=True)
class Tiny:
    """An architecture that FanLoRA's tests go over, with what is known of it."""

    architecture: str
    num_modules: int
    """How many linear layers FanLoRA chooses among."""
    task_type: str = "CAUSAL_LM"
    others: frozenset[str] = frozenset()
    """The linear layers outside the blocks that "all-linear" adapts as well."""
    labels: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.clone)

    def base(self, **overrides: Any) -> nn.Module:
        """Makes the model, always with the same weights."""
        return tiny(self.architecture, **overrides)

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


TINY = {
    "llama": Tiny("llama", 21),
    "qwen2": Tiny("qwen2", 21),
    "gemma": Tiny("gemma", 21),
    "gpt2": Tiny("gpt2", 12),
    "opt": Tiny("opt", 18),
    "t5": Tiny(
        "t5_gated",
        2 * 7 + 2 * 11,
        task_type="SEQ_2_SEQ_LM",
        labels=lambda input_ids: input_ids.flip(1)[:, :5].contiguous(),
    ),
    "bert": Tiny(
        "bert",
        18,
        task_type="SEQ_CLS",
        others=frozenset({"bert.pooler.dense"}),
        labels=lambda input_ids: input_ids[:, 0] % 3,
    ),
}


def config_of(method: str, **fields: Any) -> PeftConfig:
    """Returns a configuration of rank 4."""
    return METHODS[method](**{"r": 4, "task_type": "CAUSAL_LM", **fields})


def randomize(model: nn.Module, adapter: str | None = None, *, seed: int = 1, std: float = 0.4) -> nn.Module:
    """Gives the adapters of a model random weights; `adapter` names a single one."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and "magnitude" not in name and (adapter is None or f".{adapter}" in name):
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter) * std
    for layer in (layer for layer in model.modules() if isinstance(layer, ParaLayer)):
        for name, vectors in layer.para_generator.items():
            if adapter in (None, name):
                _randomize_generator(vectors, generator, std)
    return model


def _randomize_generator(vectors: nn.Module, generator: torch.Generator, std: float) -> None:
    for name, parameter in vectors.named_parameters():
        if name.startswith("up") or name == "query":
            noise = torch.randn(parameter.shape, generator=generator) * std
            if name == "query":
                noise *= parameter.numel() ** 0.5  # else the attention would be close to a mean
            parameter.data.copy_(noise.to(parameter))


def adapted(method: str, architecture: str = "llama", base: nn.Module | None = None, **config: Any) -> PeftModel:
    """Returns a tiny model with an adapter that changes what it computes, in eval mode."""
    base = tiny(architecture) if base is None else base
    return randomize(get_peft_model(base, config_of(method, **config))).eval()


def fanlora(name: str = "llama", *, base: nn.Module | None = None, **config: Any) -> PeftModel:
    """Returns the model of a name in `TINY` with a FanLoRA adapter that changes what it computes, in eval mode."""
    base = TINY[name].base() if base is None else base
    return adapted("FanLoRA", base=base, **{"task_type": TINY[name].task_type, **config})


def para(name: str = "llama", task_type: str | None = "CAUSAL_LM", seed: int = 0, **config: Any) -> PeftModel:
    """Returns a tiny model with a PARA adapter that changes what it computes, in eval mode."""
    return adapted("PARA", base=tiny(name, seed), task_type=task_type, **config)


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Returns random token ids without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def leading(batch: torch.Tensor, length: int) -> torch.Tensor:
    """Returns a prompt mask for the first `length` tokens of each row."""
    mask = torch.zeros_like(batch, dtype=torch.bool)
    mask[:, :length] = True
    return mask


def labelled(batch: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    """Returns labels that show where the prompt ends."""
    labels = batch.clone()
    labels[:, :prompt] = -100
    return labels


def logits(model: nn.Module, batch: dict[str, Any] | torch.Tensor | None = None) -> torch.Tensor:
    """Returns the model's output for a batch, or for token ids, without a gradient."""
    batch = tokens() if batch is None else batch
    with torch.no_grad():
        return model(**(batch if isinstance(batch, dict) else {"input_ids": batch})).logits


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients that a loss leaves on the trained parameters."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_base(folder: Path, architecture: str = "llama", **overrides: Any) -> str:
    """Saves a tiny base model, and returns its folder."""
    tiny(architecture, **overrides).save_pretrained(folder / "base")
    return str(folder / "base")


GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}


def generate(model: nn.Module, prompt: torch.Tensor, new: int = 6, **kwargs: Any) -> Any:
    """Generates exactly `new` tokens for each row, greedily, and returns sequences and logits."""
    kwargs = {"attention_mask": torch.ones_like(prompt), **GREEDY, **kwargs}
    return model.generate(input_ids=prompt, max_new_tokens=new, min_new_tokens=new, **kwargs)


def generated(model: nn.Module, prompt: torch.Tensor | None = None, **kwargs: Any) -> list[list[int]]:
    """Returns the tokens of each row with six new ones, drawn greedily."""
    prompt = tokens() if prompt is None else prompt
    arguments = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 6, "min_new_tokens": 6, **kwargs}
    return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments).tolist()
