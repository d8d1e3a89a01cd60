"""PARA in layers that do not see (rows, tokens, features): each row is what it is alone, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from integration_tests.helpers.layouts import DEBERTA, GEMMA3, LED, LONGFORMER, SWITCH, by_row, ids, with_items
from integration_tests.helpers.models import VOCAB, para, randomize, tokens
from peft_fanlora import ParaConfig


NAMES = ["default", "two"]


def made(model_class: type, config: Any, target_modules: list[str]) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(model_class(config).eval(), ParaConfig(r=4, target_modules=target_modules))
    model.add_adapter("two", ParaConfig(r=4, target_modules=target_modules))
    return randomize(randomize(model), "two", seed=5).eval()


def check(model: PeftModel, batch: dict[str, Any], rows: int) -> None:
    """Compares the rows of a batch of one adapter, and of a mixed batch, with the same rows alone."""
    for names in (["default"] * rows, NAMES * (rows // 2)):
        call = batch if len(set(names)) == 1 else {**batch, "adapter_names": names}
        with torch.no_grad():
            found = model(**call)[0]
            for row, own in enumerate(by_row(batch, rows)):
                model.set_adapter(names[row])
                torch.testing.assert_close(found[row], model(**own)[0][0], rtol=1e-5, atol=1e-5)
        model.set_adapter("default")


@pytest.mark.parametrize("rows, tokens", [(2, 8), (4, 4), (8, 8), (4, 8)])
@pytest.mark.parametrize("architecture", ["longformer", "led", "xlnet"])
def test_tokens_first(architecture: str, rows: int, tokens: int) -> None:
    """As many rows as tokens were taken for each other; other numbers were refused."""
    xlnet = tf.XLNetConfig(vocab_size=VOCAB, d_model=16, n_layer=2, n_head=4, d_inner=24)
    model, batch = {
        "longformer": lambda: (
            made(tf.LongformerForMaskedLM, LONGFORMER, ["query", "value", "intermediate.dense"]),
            {"input_ids": ids(rows, tokens)},
        ),
        "led": lambda: (
            made(tf.LEDForConditionalGeneration, LED, ["query", "value", "q_proj", "v_proj", "fc1"]),
            {"input_ids": ids(rows, tokens), "decoder_input_ids": ids(rows, 5)},
        ),
        "xlnet": lambda: (made(tf.XLNetLMHeadModel, xlnet, ["layer_1"]), {"input_ids": ids(rows, tokens)}),
    }[architecture]()
    check(model, batch, rows)


@pytest.mark.parametrize("rows", [2, 4, 10])
def test_models_that_read_no_text(rows: int) -> None:
    """As many images as each of them has patches were refused."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = tf.ViTConfig(**sizes, image_size=12, patch_size=4)  # nine patches and a class
    check(
        made(tf.ViTForImageClassification, config, ["q_proj", "v_proj"]),
        {"pixel_values": torch.randn(rows, 3, 12, 12)},
        rows,
    )


def test_experts_are_refused() -> None:
    batch = {"input_ids": ids(2, 7), "decoder_input_ids": ids(2, 5)}
    model = made(tf.SwitchTransformersForConditionalGeneration, SWITCH, ["q", "v", "wi"])
    for options in ({}, {"adapter_names": NAMES}):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"expert_\d\.wi received a tensor .* which entries belong to which row"),
        ):
            model(**batch, **options)
    check(made(tf.SwitchTransformersForConditionalGeneration, SWITCH, ["q", "v"]), batch, 2)


@pytest.mark.parametrize("rows", [2, 8])
def test_what_all_rows_share_is_refused(rows: int) -> None:
    model = made(tf.DebertaV2ForSequenceClassification, DEBERTA, ["query_proj", "value_proj"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"query_proj received a tensor of shape \((1|8), 8, 16\)"):
        model(input_ids=ids(rows, 7))


@pytest.mark.parametrize("items", [[1, 1], [2, 1], [2, 0]])
def test_images_are_not_rows(items: list[int]) -> None:
    """Three images of two rows were taken for three rows, by `generate`, which encodes them by itself."""
    model = made(tf.Gemma3ForConditionalGeneration, GEMMA3, r".*language_model.*(q_proj|v_proj|up_proj)")
    batch, alone = with_items(items, (3, 16, 16), "pixel_values")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        logits = model(**batch, adapter_names=NAMES).logits
        mixed = model.generate(**batch, adapter_names=NAMES, **options)
        for row, name in enumerate(NAMES):
            model.set_adapter(name)
            torch.testing.assert_close(logits[row], model(**alone[row]).logits[0], rtol=1e-5, atol=1e-5)
            assert mixed[row].equal(model.generate(**alone[row], **options)[0])


def test_a_tower_has_no_rows() -> None:
    model = made(tf.Gemma3ForConditionalGeneration, GEMMA3, r".*(q_proj|v_proj|fc1)")
    batch, _ = with_items([2, 1], (3, 16, 16), "pixel_values")
    with torch.no_grad(), pytest.raises(ValueError, match=r"vision_tower.* received a tensor of shape \(3, 16, 16\)"):
        model(**batch, adapter_names=NAMES)
    with pytest.raises(ValueError, match=r"vision_tower.* runs over images or sounds"):
        model.generate(**batch, adapter_names=NAMES, max_new_tokens=2)


def observe_with_a_hook(layer: nn.Module, seen: list[torch.Tensor]) -> Callable[[], None]:
    return layer.register_forward_hook(lambda module, args, output: seen.append(output)).remove


def observe_all(layer: nn.Module, seen: list[torch.Tensor]) -> Callable[[], None]:
    hook = nn.modules.module.register_module_forward_hook
    return hook(lambda module, args, output: seen.append(output) if module is layer else None).remove


def observe_from_forward(layer: nn.Module, seen: list[torch.Tensor]) -> Callable[[], None]:
    forward = layer.forward

    def observed(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(forward(*args, **kwargs))
        return seen[-1]

    layer.forward = observed
    return lambda: vars(layer).pop("forward")


@pytest.mark.parametrize("observe", [observe_with_a_hook, observe_all, observe_from_forward])
def test_what_is_recorded_of_the_base_layer_stays_its_output(observe: Callable[..., Callable[[], None]]) -> None:
    """Scaling in place overwrote what a hook on the base layer had recorded."""
    model = para()
    layer = model.base_model.model.model.layers[0].self_attn.v_proj.base_layer
    seen: list[torch.Tensor] = []
    remove = observe(layer, seen)
    with torch.no_grad():
        model(tokens(2, 5))
        with model.disable_adapter():
            model(tokens(2, 5))
    remove()
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=0)
