"""Mixed batches in layers that do not see (rows, tokens, features): each row is what its adapter alone gives, or refused."""

from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from integration_tests.helpers.layouts import (
    DEBERTA,
    GEMMA3,
    LED,
    LONGFORMER,
    MOE,
    QWEN2_AUDIO,
    SMALL,
    SWITCH,
    TEXT,
    by_row,
    ids,
    with_items,
)
from integration_tests.helpers.models import VOCAB, randomize
from peft_fanlora import FanLoraConfig


def adapted(model: nn.Module, **config: Any) -> PeftModel:
    """Two adapters that change the output."""
    peft_model = get_peft_model(model.eval(), FanLoraConfig(r=4, **config))
    peft_model.add_adapter("two", FanLoraConfig(r=2, **config))
    randomize(peft_model, std=0.3)
    return peft_model.eval()


def made(model_class: type, config: Any, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return adapted(model_class(config), **options)


def first_output(model: PeftModel, batch: dict[str, Any]) -> torch.Tensor:
    output = model(**batch)
    return output if isinstance(output, torch.Tensor) else output[0]


def check(model: PeftModel, batch: dict[str, Any], alone: list[dict[str, Any]]) -> None:
    """Compares each row of a mixed batch with what PEFT's own path gives for it alone."""
    names = (["default", "two"] * len(alone))[: len(alone)]
    with torch.no_grad():
        mixed = first_output(model, {**batch, "adapter_names": names})
    for row, name in enumerate(names):
        model.set_adapter(name)
        with torch.enable_grad():  # PEFT's own path
            expected = first_output(model, alone[row])[0].detach()
        assert (mixed[row] - expected).abs().max() < 1e-5 * max(1, expected.abs().max()), (row, name)


@pytest.mark.parametrize("rows, tokens", [(2, 7), (4, 4), (8, 8), (4, 8), (8, 7)])
@pytest.mark.parametrize("architecture", ["longformer", "led", "xlnet", "qwen2_moe"])
def test_rows_are_found_whatever_the_order_of_dimensions(architecture: str, rows: int, tokens: int) -> None:
    """Longformer, LED's encoder and XLNet put the tokens first, shared experts see (rows · tokens, features)."""
    model = {
        "longformer": lambda: made(tf.LongformerForMaskedLM, LONGFORMER),
        "led": lambda: made(tf.LEDForConditionalGeneration, LED, task_type="SEQ_2_SEQ_LM"),
        "xlnet": lambda: made(
            tf.XLNetLMHeadModel, tf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=24)
        ),
        "qwen2_moe": lambda: made(tf.Qwen2MoeForCausalLM, MOE, task_type="CAUSAL_LM"),
    }[architecture]()
    batch = {"input_ids": ids(rows, tokens)}
    if architecture == "led":
        batch["decoder_input_ids"] = ids(rows, 5)
    check(model, batch, by_row(batch, rows))


@pytest.mark.parametrize("model_class, config", [(tf.LongformerForMaskedLM, LONGFORMER), (tf.LEDModel, LED)])
def test_global_tokens(model_class: type, config: Any) -> None:
    model = made(model_class, config)
    batch = {"input_ids": ids(4, 8), "global_attention_mask": torch.zeros(4, 8, dtype=torch.long)}
    batch["global_attention_mask"][:, 0] = 1
    if model_class is tf.LEDModel:
        batch["decoder_input_ids"] = ids(4, 5)
    check(model, batch, by_row(batch, 4))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_of_an_encoder_that_puts_the_tokens_first(options: dict[str, Any]) -> None:
    model = made(tf.LEDForConditionalGeneration, LED, task_type="SEQ_2_SEQ_LM")
    options = {**options, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    batch = ids(2, 7)
    mixed = model.generate(input_ids=batch, adapter_names=["default", "two"], **options)
    for row, name in enumerate(["default", "two"]):
        model.set_adapter(name)
        assert mixed.chunk(2)[row].equal(model.generate(input_ids=batch[row : row + 1], **options))


def whisper() -> PeftModel:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "num_mel_bins": 8, "max_source_positions": 10}
    heads = {f"{part}_attention_heads": 4 for part in ("encoder", "decoder")} | {"max_target_positions": 20}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = tf.WhisperConfig(
        vocab_size=VOCAB, encoder_ffn_dim=24, decoder_ffn_dim=24, **sizes, **heads, **ids, begin_suppress_tokens=None
    )
    return made(tf.WhisperForConditionalGeneration, config)


@pytest.mark.parametrize("rows", [2, 4, 10])
@pytest.mark.parametrize("architecture", ["whisper", "vit"])
def test_models_that_read_no_text(architecture: str, rows: int) -> None:
    """In Whisper's first layer the sound is a small part beside the positions, which all rows share."""
    if architecture == "whisper":
        batch = {"input_features": torch.randn(rows, 8, 20), "decoder_input_ids": ids(rows, rows)}
        check(whisper(), batch, by_row(batch, rows))
    else:
        sizes = {key: value for key, value in SMALL.items() if key != "vocab_size"}
        batch = {"pixel_values": torch.randn(rows, 3, 8, 8)}
        check(
            made(tf.ViTForImageClassification, tf.ViTConfig(**sizes, image_size=8, patch_size=4)),
            batch,
            by_row(batch, rows),
        )


@pytest.mark.parametrize("rows, choices, tokens", [(2, 3, 7), (2, 2, 2)])
def test_multiple_choice(rows: int, choices: int, tokens: int) -> None:
    model = made(tf.BertForMultipleChoice, tf.BertConfig(**SMALL))
    batch = {"input_ids": ids(rows, choices, tokens)}
    check(model, batch, by_row(batch, rows))


@pytest.mark.parametrize("items", [[1, 1], [2, 1], [2, 0], [0, 2], [1, 2, 1]])
@pytest.mark.parametrize("target_modules", ["all-linear", r".*language_model.*(q_proj|up_proj)"])
def test_images_go_with_their_rows(items: list[int], target_modules: str) -> None:
    """Two rows with three images were taken for three rows, and two images in one row for one in each."""
    model = made(tf.Gemma3ForConditionalGeneration, GEMMA3, task_type="CAUSAL_LM", target_modules=target_modules)
    check(model, *with_items(items, (3, 16, 16), "pixel_values"))


@pytest.mark.parametrize("num_beams", [1, 2])
def test_images_in_generate(num_beams: int) -> None:
    model = made(tf.Gemma3ForConditionalGeneration, GEMMA3, task_type="CAUSAL_LM")
    batch, alone = with_items([2, 1], (3, 16, 16), "pixel_values")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    mixed = model.generate(**batch, adapter_names=["default", "two"], **options)
    for row, name in enumerate(["default", "two"]):
        model.set_adapter(name)
        assert mixed[row].equal(model.generate(**alone[row], **options)[0])


@pytest.mark.parametrize("items", [[1, 1], [2, 1], [2, 0]])
def test_sounds_go_with_their_rows(items: list[int]) -> None:
    model = made(tf.Qwen2AudioForConditionalGeneration, QWEN2_AUDIO, task_type="CAUSAL_LM")
    check(model, *with_items(items, (8, 16), "input_features"))


def test_images_of_uncertain_rows_are_refused() -> None:
    model = made(tf.Gemma3ForConditionalGeneration, GEMMA3, task_type="CAUSAL_LM")
    batch, _ = with_items([2, 1], (3, 16, 16), "pixel_values")
    batch["input_ids"][0, 8] = 5  # seven places for two images, and four for one
    with torch.no_grad(), pytest.raises(ValueError, match=r"the rows cannot be found in the input of .*vision_tower"):
        model(**batch, adapter_names=["default", "two"])


class Experts(nn.Module):
    """A mixture whose experts are modules: each sees the tokens that are sent to it, in an order of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 8)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        tokens = hidden.reshape(-1, 8)
        chosen = self.gate(tokens).topk(2, -1).indices
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            _, sent = torch.where((chosen == index).T)
            mixed.index_add_(0, sent, expert(tokens[sent]))
        return hidden + self.out(mixed.view_as(hidden))


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


@pytest.mark.parametrize("rows, tokens", [(2, 3), (4, 1), (2, 2), (8, 1)])
def test_experts_are_refused_and_what_is_around_them_is_not(rows: int, tokens: int) -> None:
    """An expert that happens to see as many tokens as there are rows took the first for the first row's."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, tokens, 8)
    everything = adapted(Mixture(), target_modules=r".*\.(experts\.\d|out)")
    with torch.no_grad(), pytest.raises(ValueError, match=r"not certain .* layers\.0\.experts\.\d+ belongs"):
        everything(hidden, adapter_names=["default", "two"] * (rows // 2))
    around = adapted(Mixture(), target_modules=["gate", "out"])
    check(around, {"hidden": hidden}, by_row({"hidden": hidden}, rows))


def test_experts_of_a_pretrained_model_are_refused() -> None:
    batch = {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 5)}
    model = made(tf.SwitchTransformersForConditionalGeneration, SWITCH, task_type="SEQ_2_SEQ_LM")
    with torch.no_grad(), pytest.raises(ValueError, match=r"not certain .*expert_\d\.wi belongs"):
        model(**batch, adapter_names=["default", "two"])
    attention = made(
        tf.SwitchTransformersForConditionalGeneration, SWITCH, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]
    )
    check(attention, batch, by_row(batch, 2))


@pytest.mark.parametrize("rows", [2, 8])
def test_what_all_rows_share_is_refused(rows: int) -> None:
    """DeBERTa sends its relative positions through the query projection; eight rows are as many as there are positions."""
    batch = {"input_ids": ids(rows, 7)}
    names = ["default", "two"] * (rows // 2)
    model = made(tf.DebertaV2ForSequenceClassification, DEBERTA)
    with torch.no_grad(), pytest.raises(ValueError, match=r"not certain .*query_proj belongs"):
        model(**batch, adapter_names=names)
    values = made(tf.DebertaV2ForSequenceClassification, DEBERTA, target_modules=["value_proj", "dense"])
    check(values, batch, by_row(batch, rows))


def test_rows_doubled_for_guidance_are_refused() -> None:
    """Guidance inside of a model repeats the batch as a whole, and not row by row as beams do."""
    config = tf.LlamaConfig(**TEXT, pad_token_id=0)
    model = made(tf.LlamaForCausalLM, config, task_type="CAUSAL_LM")
    base = model.base_model.model
    prepare = base.prepare_inputs_for_generation

    def doubled(*args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = prepare(*args, **kwargs)
        return {name: torch.cat([value] * 2) if name == "input_ids" else value for name, value in inputs.items()}

    base.prepare_inputs_for_generation = doubled
    with pytest.raises(ValueError, match="but got 2 and 4 respectively"):
        model.generate(input_ids=ids(2, 5), adapter_names=["default", "two"], max_new_tokens=2)
