"""Tiny models of many architectures, and adapters that do something.

A fresh adapter is the identity, which hides every mistake: `awaken` gives it random vectors.
"""

import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from peft_fanlora import ParaConfig
from peft_fanlora.para import ParaLayer, VectorGenerator


VOCAB = 89
IDS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    **IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
GPT2 = {**IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
BERT = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
ENCODER_DECODER = {
    **IDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
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
    "opt": (tf.OPTConfig, {**BERT, **IDS, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": (tf.BloomConfig, {**IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": (
        tf.FalconConfig,
        {**IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    ),
    "falcon_new": (
        tf.FalconConfig,
        {
            **IDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
        },
    ),
    "mpt": (tf.MptConfig, {**IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128}),
    "mixtral": (tf.MixtralConfig, {**LLAMA, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "qwen3_moe": (
        tf.Qwen3MoeConfig,
        {**LLAMA, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
    ),
}
ENCODERS = {
    "bert": (tf.BertConfig, BERT),
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
    "distilbert": (tf.DistilBertConfig, {**IDS, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
}
SEQ2SEQ = {
    "t5": (
        tf.T5Config,
        {**IDS, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    ),
    "t5_gated": (
        tf.T5Config,
        {
            **IDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
            "feed_forward_proj": "gated-gelu",
        },
    ),
    "bart": (tf.BartConfig, ENCODER_DECODER),
}


def tiny(name: str, seed: int = 0, **overrides) -> nn.Module:
    """Returns a tiny model of an architecture, in eval mode, with weights that make a difference."""
    torch.manual_seed(seed)
    if name in CAUSAL:
        config_class, fields = CAUSAL[name]
        model = tf.AutoModelForCausalLM.from_config(config_class(**{**fields, **overrides}))
    elif name in ENCODERS:
        config_class, fields = ENCODERS[name]
        model = tf.AutoModelForSequenceClassification.from_config(config_class(**{**fields, **overrides}))
    else:
        config_class, fields = SEQ2SEQ[name]
        model = tf.AutoModelForSeq2SeqLM.from_config(config_class(**{**fields, **overrides}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


def awaken(model: nn.Module, adapter: str = "default", seed: int = 1, size: float = 0.4) -> nn.Module:
    """Gives an adapter random vectors and queries, so that it changes what the model computes."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, ParaLayer) and adapter in layer.para_generator:
            vectors = layer.para_generator[adapter]
            assert isinstance(vectors, VectorGenerator)
            for name, parameter in vectors.named_parameters():
                if name.startswith("up") or name == "query":
                    noise = torch.randn(parameter.shape, generator=generator) * size
                    if name == "query":
                        noise *= parameter.numel() ** 0.5  # else the attention would be close to a mean
                    parameter.data.copy_(noise.to(parameter))
    return model


def para(name: str = "llama", task_type: str | None = "CAUSAL_LM", seed: int = 0, **config) -> nn.Module:
    """Returns a tiny model with an awakened PARA adapter, in eval mode."""
    config = {"r": 4, **config}
    return awaken(get_peft_model(tiny(name, seed), ParaConfig(task_type=task_type, **config))).eval()


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    """Returns random token ids without special tokens."""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def leading(batch: torch.Tensor, length: int) -> torch.Tensor:
    """Returns a prompt mask for the first `length` tokens of each row."""
    mask = torch.zeros_like(batch, dtype=torch.bool)
    mask[:, :length] = True
    return mask


GREEDY = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}


def generate(model: nn.Module, prompt: torch.Tensor, new: int = 6, **kwargs):
    """Generates exactly `new` tokens for each row, greedily, and returns sequences and logits."""
    kwargs = {"attention_mask": torch.ones_like(prompt), **GREEDY, **kwargs}
    return model.generate(input_ids=prompt, max_new_tokens=new, min_new_tokens=new, **kwargs)
