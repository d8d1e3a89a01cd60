"""Models whose layers see other shapes than (rows, tokens, features), and batches for them."""

from typing import Any

import torch
import transformers as tf

from integration_tests.helpers.models import VOCAB


SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


LONGFORMER = tf.LongformerConfig(**SMALL, attention_window=4, max_position_embeddings=70, pad_token_id=1)


LED = tf.LEDConfig(
    vocab_size=VOCAB,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    attention_window=4,
    max_encoder_position_embeddings=64,
    max_decoder_position_embeddings=64,
)


SWITCH = tf.SwitchTransformersConfig(
    vocab_size=VOCAB,
    d_model=16,
    d_kv=4,
    d_ff=24,
    num_layers=2,
    num_decoder_layers=2,
    num_heads=4,
    num_experts=4,
    num_sparse_encoder_layers=1,
    num_sparse_decoder_layers=1,
    decoder_start_token_id=0,
)


DEBERTA = tf.DebertaV2Config(
    **SMALL, relative_attention=True, pos_att_type=["c2p", "p2c"], share_att_key=True, position_buckets=4
)


TEXT = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 64}


MOE = tf.Qwen2MoeConfig(
    **TEXT, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts_per_tok=2
)


IMAGE, IMAGE_TOKENS = 62, 4


GEMMA3 = tf.Gemma3Config(
    text_config={**TEXT, "head_dim": 4, "sliding_window": 16},
    vision_config={**SMALL, "image_size": 16, "patch_size": 4},
    mm_tokens_per_image=IMAGE_TOKENS,
    image_token_index=IMAGE,
    boi_token_index=61,
    eoi_token_index=60,
)


QWEN2_AUDIO = tf.Qwen2AudioConfig(
    audio_config={"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 24}
    | {"num_mel_bins": 8, "max_source_positions": 8},
    text_config={"model_type": "qwen2", **TEXT},
    audio_token_index=IMAGE,
)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, 50, shape, generator=torch.Generator().manual_seed(0))


def by_row(batch: dict[str, Any], rows: int) -> list[dict[str, Any]]:
    return [{name: value[row : row + 1] for name, value in batch.items()} for row in range(rows)]


def with_items(items: list[int], shape: tuple[int, ...], name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns a batch whose rows have the given numbers of images or sounds, and each row alone."""
    text = ids(len(items), 14)
    for row, number in enumerate(items):
        text[row, 1 : 1 + IMAGE_TOKENS * number] = IMAGE
    features = torch.randn(sum(items), *shape, generator=torch.Generator().manual_seed(0))
    batch: dict[str, Any] = {"input_ids": text, "attention_mask": torch.ones_like(text), name: features}
    own = list(features.split(items))
    alone = [
        {**row, name: own[index]} if items[index] else row
        for index, row in enumerate(by_row({key: batch[key] for key in ("input_ids", "attention_mask")}, len(items)))
    ]
    for call in (batch, *alone):
        if name == "input_features" and name in call:
            call["feature_attention_mask"] = torch.ones(len(call[name]), 16, dtype=torch.long)
        elif name == "pixel_values":
            call["token_type_ids"] = (call["input_ids"] == IMAGE).long()
    return batch, alone
