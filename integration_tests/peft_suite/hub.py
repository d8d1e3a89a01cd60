"""A stand-in for the Hub: tiny models for the ids that PEFT's tests ask for.

Written in the layout of the Hub's cache, so that `from_pretrained` finds them without a network and without patches.
The models have random weights; their sizes are those that the tests speak of, such as numbers of layers.
"""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_fanlora import FanLoraConfig, ParaConfig


VOCAB = 1024
SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


@dataclass(frozen=True)
class Model:
    """A model of the stand-in hub."""

    model_class: str
    config_class: str
    config: dict[str, Any]
    revisions: tuple[str, ...] = ("main",)
    tokens: int = VOCAB
    """The size of its tokenizer."""

    def save(self, folder: Path, revision: str) -> None:
        torch.manual_seed(sum(map(ord, revision)))
        config = getattr(transformers, self.config_class)(**self.config)
        model = getattr(transformers, self.model_class)(config)
        model.save_pretrained(folder)
        save_tokenizer(folder, self.tokens)


@dataclass(frozen=True)
class Adapter:
    """An adapter of the method under test, as somebody might have pushed it."""

    base: str
    model_class: str
    task_type: str | None = None
    revisions: tuple[str, ...] = ("main",)
    subfolder: str = ""

    def save(self, method: str, folder: Path, revision: str) -> None:
        torch.manual_seed(sum(map(ord, revision)))
        base = getattr(transformers, self.model_class).from_pretrained(self.base)
        self.adapt(base, method).save_pretrained(folder / self.subfolder)

    def adapt(self, base: Any, method: str) -> peft.PeftModel:
        config_class = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}[method]
        return peft.get_peft_model(base, config_class(task_type=self.task_type))


def save_tokenizer(folder: Path, tokens: int) -> None:
    """Saves a tokenizer of single bytes, filled up with unused words."""
    words = [*SPECIAL_TOKENS.values(), *pre_tokenizers.ByteLevel.alphabet()]
    words += [f"<unused{number}>" for number in range(tokens - len(words))]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS).save_pretrained(folder)


def _decoder(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }


def _opt(layers: int = 5, **changes: Any) -> Model:
    sizes = {"ffn_dim": 64, "word_embed_proj_dim": 64, "num_hidden_layers": layers, "max_position_embeddings": 256}
    return Model("OPTForCausalLM", "OPTConfig", _decoder(**sizes, **changes))


def _gpt2() -> Model:
    sizes = {"n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Model("GPT2LMHeadModel", "GPT2Config", {**sizes, **ids})


def _encoder(model_class: str, config_class: str, **changes: Any) -> Model:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 5}
    config = {"vocab_size": VOCAB, "max_position_embeddings": 256, "pad_token_id": 0, **sizes, **changes}
    return Model(model_class, config_class, config)


def _t5(**changes: Any) -> Model:
    sizes = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 5, "num_heads": 4}
    return Model("T5ForConditionalGeneration", "T5Config", {**sizes, "decoder_start_token_id": 0, **changes})


def _llama() -> Model:
    return Model("LlamaForCausalLM", "LlamaConfig", _decoder(num_key_value_heads=4))


MODELS: dict[str, Model] = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": _opt(),
    "peft-internal-testing/opt-125m": _opt(12),
    "facebook/opt-125m": _opt(12),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "peft-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": _llama(),
    "peft-internal-testing/tiny-random-gpt2": _gpt2(),
    "hf-internal-testing/tiny-random-gpt2": _gpt2(),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": _gpt2(),
    "gpt2": _gpt2(),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": Model(
        "GPTJForCausalLM",
        "GPTJConfig",
        {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 5, "n_head": 4, "n_positions": 256, "rotary_dim": 4}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "peft-internal-testing/tiny-random-GPTNeoXForCausalLM": Model("GPTNeoXForCausalLM", "GPTNeoXConfig", _decoder()),
    "peft-internal-testing/tiny-random-BloomForCausalLM": Model(
        "BloomForCausalLM", "BloomConfig", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 5, "n_head": 4}
    ),
    "peft-internal-testing/tiny-dummy-qwen2": Model(
        "Qwen2ForCausalLM", "Qwen2Config", _decoder(hidden_size=8, intermediate_size=32)
    ),
    "Qwen/Qwen2-0.5B": Model("Qwen2ForCausalLM", "Qwen2Config", _decoder(), tokens=VOCAB - 100),
    "trl-internal-testing/tiny-Qwen3ForCausalLM": Model("Qwen3ForCausalLM", "Qwen3Config", _decoder(head_dim=4)),
    "hf-internal-testing/tiny-random-MistralForCausalLM": Model("MistralForCausalLM", "MistralConfig", _decoder()),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": Model(
        "Gemma3ForCausalLM", "Gemma3TextConfig", _decoder(head_dim=4)
    ),
    "tiiuae/falcon-mamba-tiny-dev": Model(
        "FalconMambaForCausalLM",
        "FalconMambaConfig",
        {"vocab_size": VOCAB, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "pad_token_id": 0},
    ),
    "hf-internal-testing/Mixtral-tiny": Model(
        "MixtralForCausalLM", "MixtralConfig", _decoder(num_local_experts=4, num_experts_per_tok=2)
    ),
    "trl-internal-testing/tiny-GptOssForCausalLM": Model(
        "GptOssForCausalLM", "GptOssConfig", _decoder(num_local_experts=4, num_experts_per_tok=2, head_dim=8)
    ),
    "trl-internal-testing/tiny-Qwen3MoeForCausalLM": Model(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _decoder(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    ),
    "hf-internal-testing/tiny-qwen3-moe": Model(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        _decoder(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
    ),
    "trl-internal-testing/tiny-Llama4ForCausalLM": Model(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _decoder(hidden_size=16, intermediate_size=32, num_local_experts=4, head_dim=8)
        | {"intermediate_size_mlp": 32, "attention_chunk_size": 64},
    ),
    "peft-internal-testing/tiny-random-BertModel": Model(
        "BertForPreTraining",
        "BertConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        | {"num_hidden_layers": 5, "max_position_embeddings": 256},
        revisions=("main", "v2.0.0"),
    ),
    "hf-internal-testing/tiny-random-BertModel": _encoder("BertForPreTraining", "BertConfig"),
    "bert-base-uncased": _encoder("BertForMaskedLM", "BertConfig"),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": _encoder(
        "BertForSequenceClassification", "BertConfig"
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": _encoder(
        "RobertaForSequenceClassification", "RobertaConfig"
    ),
    "peft-internal-testing/tiny-random-RobertaModel": _encoder("RobertaModel", "RobertaConfig"),
    "peft-internal-testing/tiny-random-DebertaModel": _encoder(
        "DebertaModel", "DebertaConfig", pos_att_type=["c2p", "p2c"], relative_attention=True
    ),
    "peft-internal-testing/tiny-random-DebertaV2Model": _encoder(
        "DebertaV2Model", "DebertaV2Config", pos_att_type=["c2p", "p2c"], relative_attention=True
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": Model(
        "LlamaForSequenceClassification", "LlamaConfig", _decoder(num_labels=2)
    ),
    "peft-internal-testing/tiny-random-t5": _t5(),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration": _t5(),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": _t5(),
    "google/flan-t5-small": _t5(feed_forward_proj="gated-gelu"),
    "google/flan-t5-base": _t5(feed_forward_proj="gated-gelu"),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": Model(
        "BartForConditionalGeneration",
        "BartConfig",
        {"vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
        | {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 256},
    ),
    "openai/whisper-tiny": Model(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32}
        | {"decoder_ffn_dim": 32, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "pad_token_id": 0}
        | {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "suppress_tokens": []}
        | {"begin_suppress_tokens": []},
    ),
    "peft-internal-testing/tiny-clip-text-2": Model(
        "CLIPTextModelWithProjection",
        "CLIPTextConfig",
        {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4}
        | {"num_hidden_layers": 5, "projection_dim": 32, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "peft-internal-testing/tiny-random-ResNetForImageClassification": Model(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3, "layer_type": "basic"},
    ),
}

OPT = "peft-internal-testing/tiny-random-OPTForCausalLM"
ADAPTERS: dict[str, Adapter] = {
    "peft-internal-testing/tiny-OPTForCausalLM-lora": Adapter(OPT, "AutoModelForCausalLM", "CAUSAL_LM"),
    "peft-internal-testing/opt-125m-dummy-lora": Adapter(
        "peft-internal-testing/opt-125m", "AutoModelForCausalLM", "CAUSAL_LM"
    ),
    "peft-internal-testing/tiny_T5ForSeq2SeqLM-lora": Adapter(
        "peft-internal-testing/tiny-random-t5", "AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"
    ),
    "peft-internal-testing/tiny_OPTForSequenceClassification-lora": Adapter(
        OPT, "AutoModelForSequenceClassification", "SEQ_CLS"
    ),
    "peft-internal-testing/tiny_OPTForQuestionAnswering-lora": Adapter(
        OPT, "AutoModelForQuestionAnswering", "QUESTION_ANS"
    ),
    "peft-internal-testing/tiny_GPT2ForTokenClassification-lora": Adapter(
        "peft-internal-testing/tiny-random-gpt2", "AutoModelForTokenClassification", "TOKEN_CLS"
    ),
    "peft-internal-testing/tiny_OPTForFeatureExtraction-lora": Adapter(OPT, "AutoModel", "FEATURE_EXTRACTION"),
    "peft-internal-testing/tiny_WhisperForConditionalGeneration-lora": Adapter(
        "openai/whisper-tiny", "WhisperForConditionalGeneration"
    ),
    "peft-internal-testing/gpt2-lora-random": Adapter(
        "peft-internal-testing/tiny-random-gpt2", "AutoModelForCausalLM", "CAUSAL_LM"
    ),
    "peft-internal-testing/tiny-random-BertModel-lora": Adapter(
        "hf-internal-testing/tiny-random-BertModel", "AutoModelForCausalLM", revisions=("main", "v1.2.3")
    ),
    "peft-internal-testing/tiny-opt-lora-revision": Adapter(
        OPT, "AutoModelForCausalLM", "CAUSAL_LM", revisions=("main", "test")
    ),
    "peft-internal-testing/test-lora-subfolder": Adapter(OPT, "AutoModelForCausalLM", "CAUSAL_LM", subfolder="test"),
}


def _save_diffusion_pipeline(folder: Path, revision: str) -> None:
    """Saves a text-to-image pipeline."""
    import diffusers

    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "norm_num_groups": 4, "layers_per_block": 1}
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        **blocks,
    )
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **blocks
    )
    text = transformers.CLIPTextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2
    )
    words = [f"{byte}{end}" for byte in pre_tokenizers.ByteLevel.alphabet() for end in ("", "</w>")]
    vocabulary = {word: index for index, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77),
        unet=unet,
        scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)


def _save_adapter_with_tokens(method: str, folder: Path, revision: str) -> None:
    """Saves an adapter along with embeddings for more tokens than its base model has; how many is the revision's."""
    tokens = VOCAB + {"main": 2, "my-revision": 5}[revision]
    base = transformers.AutoModelForCausalLM.from_pretrained(OPT)
    base.resize_token_embeddings(tokens)
    Adapter(OPT, "", "CAUSAL_LM").adapt(base, method).save_pretrained(folder)
    save_tokenizer(folder, tokens)


def _write(home: Path, name: str, revisions: tuple[str, ...], save: Callable[[Path, str], None]) -> None:
    repository = home / "hub" / f"models--{name.replace('/', '--')}"
    for revision in revisions:
        commit = hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save(snapshot, revision)
        reference = repository / "refs" / revision
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


def main(method: str) -> None:
    """Writes a method's hub to the folder `HF_HOME`, which has to be set before this module is imported."""
    home = Path(os.environ["HF_HOME"])
    for name, model in MODELS.items():
        _write(home, name, model.revisions, model.save)
    _write(home, "hf-internal-testing/tiny-sd-pipe", ("main",), _save_diffusion_pipeline)
    for name in ("tiny-random-OPTForCausalLM-extended-vocab", "opt-tokenizer-revision"):
        save = partial(_save_adapter_with_tokens, method)
        _write(home, f"peft-internal-testing/{name}", ("main", "my-revision"), save)
    for name, adapter in ADAPTERS.items():
        _write(home, name, adapter.revisions, partial(adapter.save, method))


if __name__ == "__main__":
    main(sys.argv[1])
