"""Default targets, fused projections, encoders and encoder-decoder models."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model, inject_adapter_in_model
from torch import nn

from integration_tests.helpers.models import (
    BERT,
    CAUSAL,
    ENCODER_DECODER,
    ENCODERS,
    GPT2,
    SEQ2SEQ,
    SIZES,
    adapted,
    generate,
    para,
    randomize,
    tiny,
    tokens,
)
from peft_fanlora import ParaConfig
from peft_fanlora.para.core.scaling import OutputSlices
from peft_fanlora.para.layer import ParaLayer


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def para_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, ParaLayer)]


@pytest.mark.support("default targets")
@pytest.mark.parametrize("name", sorted([*CAUSAL, *ENCODERS, *SEQ2SEQ]))
def test_every_block_gets_one_generator_and_its_targets(name):
    model = para(name, task_type=None)
    blocks = {id(layer.block): layer.block for layer in para_layers(model)}.values()
    assert len(blocks) == (4 if name in SEQ2SEQ else 3)
    for block in blocks:
        assert sum(len(layer.para_generator) for layer in block.layers) == 1
        assert len(block.layers) >= 2
    for layer in para_layers(model):
        assert layer.slices.num_outputs == layer.out_features


def test_llama_2_7b_has_the_papers_parameters():
    """8.9M parameters on LLaMA-2-7B is what a secondary page reports."""
    config = tf.LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32
    )
    with torch.device("meta"):
        base = tf.LlamaForCausalLM(config)
    for pooling, expected in (("mean", 8_945_664), ("attention", 8_945_664 + 32 * 4096)):
        model = get_peft_model(base, ParaConfig(pooling=pooling, task_type="CAUSAL_LM"), low_cpu_mem_usage=True)
        assert model.get_nb_trainable_parameters()[0] == expected
        model.unload()


def parts_of(name, model):
    """The query, key and value (or gate and up) of a fused projection, as the architecture itself cuts them."""
    config = model.config
    heads = getattr(config, "num_attention_heads", 4)
    width = model.config.hidden_size // 4
    if name in ("gpt2", "mpt"):
        return lambda y: y.chunk(3, -1)
    if name in ("gpt_neox", "bloom"):
        return lambda y: y.view(*y.shape[:-1], heads, 3, width).unbind(-2)
    if name == "falcon":
        return lambda y: (lambda v: (v[..., :-2, :], v[..., -2, :], v[..., -1, :]))(
            y.view(*y.shape[:-1], heads + 2, width)
        )
    if name == "falcon_new":
        return lambda y: (lambda v: (v[..., :-2, :], v[..., -2, :], v[..., -1, :]))(y.view(*y.shape[:-1], 2, 4, width))
    if name == "phi3":
        return lambda y: y.split((16, 8, 8), -1)
    if name == "deberta":
        return lambda y: y.view(*y.shape[:-1], heads, 3 * width).chunk(3, -1)
    raise AssertionError(name)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("gpt2", "c_attn"),
        ("mpt", "Wqkv"),
        ("gpt_neox", "query_key_value"),
        ("bloom", "query_key_value"),
        ("falcon", "query_key_value"),
        ("falcon_new", "query_key_value"),
        ("phi3", "qkv_proj"),
        ("deberta", "in_proj"),
    ],
)
@torch.no_grad()
def test_a_fused_projection_leaves_the_keys_alone(name, suffix):
    model = para(name, task_type=None)
    layer = next(layer for layer in para_layers(model) if layer.name.endswith(suffix))
    outputs = {}
    layer.base_layer.register_forward_hook(lambda module, args, out: outputs.update(base=out.clone()))
    layer.register_forward_hook(lambda module, args, out: outputs.update(scaled=out.clone()))
    model(tokens())
    cut = parts_of(name, model)
    (q, k, v), (q2, k2, v2) = cut(outputs["base"]), cut(outputs["scaled"])
    assert torch.equal(k, k2)
    assert not torch.isclose(q, q2).any() and not torch.isclose(v, v2).any()


@pytest.mark.parametrize(
    ("config", "cut"),
    [
        (
            tf.CodeGenConfig(**GPT2, rotary_dim=4),
            lambda y: (lambda q, v, k: (q, k, v))(*y.view(*y.shape[:-1], 4, 12).split(4, -1)),
        ),
        (
            tf.PersimmonConfig(**BERT, bos_token_id=1, eos_token_id=2),
            lambda y: y.view(*y.shape[:-1], 4, 3, 4).unbind(-2),
        ),
    ],
    ids=["codegen", "persimmon"],
)
@torch.no_grad()
def test_other_fused_projections_leave_the_keys_alone(config, cut):
    model = adapted("PARA", base=tf.AutoModelForCausalLM.from_config(config), task_type=None)
    layer = next(layer for layer in para_layers(model) if "qkv" in layer.name or "query_key_value" in layer.name)
    outputs = {}
    layer.base_layer.register_forward_hook(lambda module, args, out: outputs.update(base=out.clone()))
    layer.register_forward_hook(lambda module, args, out: outputs.update(scaled=out.clone()))
    model(tokens())
    (q, k, v), (q2, k2, v2) = cut(outputs["base"]), cut(outputs["scaled"])
    assert torch.equal(k, k2)
    assert not torch.isclose(q, q2, atol=0).any() and not torch.isclose(v, v2, atol=0).any()


@torch.no_grad()
def test_a_fused_gate_is_left_alone():
    model = para("phi3")
    layer = next(layer for layer in para_layers(model) if layer.name.endswith("gate_up_proj"))
    outputs = {}
    layer.base_layer.register_forward_hook(lambda module, args, out: outputs.update(base=out.clone()))
    layer.register_forward_hook(lambda module, args, out: outputs.update(scaled=out.clone()))
    model(tokens())
    (gate, up), (gate2, up2) = outputs["base"].chunk(2, -1), outputs["scaled"].chunk(2, -1)
    assert torch.equal(gate, gate2) and not torch.isclose(up, up2).any()


def test_a_fused_projection_that_does_not_fit_is_refused():
    base = tiny("gpt2")
    base.transformer.h[1].attn.c_attn = tf.pytorch_utils.Conv1D(47, 16)
    with pytest.raises(ValueError, match=r"has 47 outputs, but its fused projection in a 'gpt2' model should have 48"):
        get_peft_model(base, ParaConfig())
    assert not para_layers(base)


def test_output_slices_spread():
    slices = OutputSlices(2, ((1, True), (2, False), (1, True)))
    assert (slices.num_outputs, slices.num_scaled) == (8, 4)
    assert slices.spread(torch.tensor([[2.0, 3.0, 4.0, 5.0]])).tolist() == [[2, 1, 1, 3, 4, 1, 1, 5]]


@pytest.mark.support("forward")
@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_an_encoder_pools_its_whole_attended_input(name):
    model = para(name, task_type="SEQ_CLS")
    short = tokens(1, 5)
    padded = torch.cat((short, torch.zeros(1, 3, dtype=torch.long)), 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]])
    expected = model(short, attention_mask=torch.ones_like(short)).logits
    close(model(padded, attention_mask=mask).logits, expected)
    with model.disable_adapter():
        assert (model(short).logits - expected).abs().max() > 1e-4
    loss = model.train()(padded, attention_mask=mask, labels=torch.tensor([1])).loss
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "para_" in n)


@pytest.mark.parametrize(
    "auto",
    [tf.AutoModelForTokenClassification, tf.AutoModelForMaskedLM, tf.AutoModel, tf.AutoModelForQuestionAnswering],
)
def test_the_other_tasks_of_an_encoder(auto):
    torch.manual_seed(0)
    base = auto.from_config(tf.BertConfig(**BERT)).eval()
    expected = base(tokens())[0]
    model = get_peft_model(base, ParaConfig()).eval()
    assert torch.equal(model(tokens())[0], expected)
    randomize(model)
    changed = model(tokens())[0]
    assert (changed - expected).abs().max() > 1e-4
    model.train()
    labels = torch.full((2, 7), -100)
    labels[:, 2] = 1
    if auto in (tf.AutoModelForTokenClassification, tf.AutoModelForMaskedLM):
        model(tokens(), labels=labels).loss.backward()


CHOICES = torch.stack((tokens(2, 9, seed=1), tokens(2, 9, seed=2), tokens(2, 9, seed=3)), 1)


def multiple_choice(name: str = "bert", adapters: tuple[str, ...] = ("default",)) -> nn.Module:
    torch.manual_seed(0)
    config_class, fields = ENCODERS[name]
    base = tf.AutoModelForMultipleChoice.from_config(config_class(**fields))
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)
    model = get_peft_model(base, ParaConfig(r=4))
    for seed, adapter in enumerate(adapters):
        if adapter not in model.peft_config:
            model.add_adapter(adapter, ParaConfig(r=4))
        randomize(model, adapter, seed=seed)
    return model.eval()


def each_choice(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **kwargs) -> torch.Tensor:
    """Returns the logits of choices that are passed one at a time."""
    logits = [
        model(input_ids=row[None, i : i + 1], attention_mask=attended[None, i : i + 1], **kwargs).logits
        for row, attended in zip(ids, mask, strict=True)
        for i in range(ids.shape[1])
    ]
    return torch.cat(logits).view(ids.shape[:2])


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "distilbert", "roberta"])
@torch.no_grad()
def test_multiple_choice(name):
    """Guards against a choice that is taken for a token: the model makes a row of each."""
    model, mask = multiple_choice(name), torch.ones_like(CHOICES)
    mask[0, 1, 6:] = 0
    logits = model(input_ids=CHOICES, attention_mask=mask, labels=torch.tensor([0, 2])).logits
    torch.testing.assert_close(logits, each_choice(model, CHOICES, mask), atol=1e-5, rtol=1e-5)
    cut = each_choice(model, CHOICES[:1, 1:2, :6], mask[:1, 1:2, :6])
    torch.testing.assert_close(logits[:1, 1:2], cut, atol=1e-5, rtol=1e-5)
    embeds = model.get_input_embeddings()(CHOICES)
    torch.testing.assert_close(model(inputs_embeds=embeds, attention_mask=mask).logits, logits, atol=1e-5, rtol=1e-5)
    with model.disable_adapter():
        assert (model(input_ids=CHOICES, attention_mask=mask).logits - logits).abs().max() > 1e-3


@torch.no_grad()
def test_multiple_choice_with_a_prompt_mask_and_with_an_adapter_for_each_row():
    model, mask = multiple_choice(adapters=("default", "second")), torch.ones_like(CHOICES)
    prompt = torch.arange(9).expand(2, 3, 9) < torch.tensor([3, 5, 7]).view(1, 3, 1)
    logits = model(input_ids=CHOICES, prompt_mask=prompt).logits
    for i in range(3):
        alone = model(input_ids=CHOICES[:, i : i + 1], prompt_mask=prompt[:, i : i + 1]).logits
        torch.testing.assert_close(logits[:, i : i + 1], alone, atol=1e-5, rtol=1e-5)
    mixed = model(input_ids=CHOICES, attention_mask=mask, adapter_names=["second", "default"]).logits
    torch.testing.assert_close(mixed[1:], each_choice(model, CHOICES[1:], mask[1:]), atol=1e-5, rtol=1e-5)
    model.set_adapter("second")
    torch.testing.assert_close(mixed[:1], each_choice(model, CHOICES[:1], mask[:1]), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="got 3 and 6 respectively"):
        model(input_ids=CHOICES, adapter_names=["second", "default", "second"])


@torch.no_grad()
def test_a_causal_model_with_choices():
    """Each choice has a prompt of its own, which the labels show."""
    torch.manual_seed(0)
    config_class, fields = CAUSAL["gpt2"]
    base = tf.GPT2DoubleHeadsModel(config_class(**fields))
    model = randomize(get_peft_model(base, ParaConfig(r=4))).eval()
    labels = CHOICES.clone()
    for i in range(3):
        labels[:, i, : i + 3] = -100
    last = torch.full((2, 3), 8)
    logits = model(CHOICES, mc_token_ids=last, labels=labels).logits
    for i in range(3):
        alone = model(CHOICES[:, i : i + 1], mc_token_ids=last[:, :1], labels=labels[:, i : i + 1]).logits
        torch.testing.assert_close(logits[:, i : i + 1], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.support("sequence classification")
def test_a_causal_backbone_that_classifies_reads_its_whole_input():
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(tf.LlamaConfig(**CAUSAL["llama"][1]))
    model = randomize(get_peft_model(base, ParaConfig(task_type="SEQ_CLS"))).train()
    model(tokens(), labels=torch.tensor([0, 1])).loss.backward()


@pytest.mark.support("image models")
@torch.no_grad()
def test_vision():
    torch.manual_seed(0)
    config = tf.ViTConfig(**SIZES, image_size=16, patch_size=8)
    base = tf.ViTForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = base(pixels).logits
    model = get_peft_model(base, ParaConfig()).eval()
    assert torch.equal(model(pixels).logits, expected)
    randomize(model)
    assert (model(pixels).logits - expected).abs().max() > 1e-4
    close(model(pixels[:1]).logits, model(pixels).logits[:1])


@pytest.mark.parametrize("name", sorted(SEQ2SEQ))
class TestEncoderDecoder:
    """The prompt is the encoder's input; decoder blocks pool the encoder's output."""

    @pytest.mark.support("forward")
    @torch.no_grad()
    def test_identity(self, name):
        base = tiny(name)
        source, target = tokens(2, 6), tokens(2, 5, seed=1)
        expected = base(input_ids=source, labels=target).logits
        assert torch.equal(get_peft_model(base, ParaConfig()).eval()(input_ids=source, labels=target).logits, expected)

    @pytest.mark.support("generation")
    @pytest.mark.parametrize("beams", [1, 2])
    @torch.no_grad()
    def test_generation_equals_one_teacher_forced_pass(self, name, beams):
        model = para(name, task_type="SEQ_2_SEQ_LM")
        source = tokens(2, 6)
        mask = torch.ones_like(source)
        mask[0, 4:] = 0
        kwargs = {
            "attention_mask": mask,
            "max_new_tokens": 6,
            "min_new_tokens": 6,
            "do_sample": False,
            "num_beams": beams,
        }
        made = model.generate(input_ids=source, output_logits=True, return_dict_in_generate=True, **kwargs)
        uncached = model.generate(input_ids=source, use_cache=False, **kwargs)
        assert made.sequences.tolist() == uncached.tolist()
        alone = model.generate(**{**kwargs, "attention_mask": None}, input_ids=source[:1, :4])
        assert alone[0].tolist() == made.sequences[0].tolist()
        if beams == 1:
            forced = model(input_ids=source, attention_mask=mask, decoder_input_ids=made.sequences[:, :-1]).logits
            close(torch.stack(made.logits, 1), forced)

    def test_answer_tokens_change_no_logit_before_them(self, name):
        model = para(name, task_type="SEQ_2_SEQ_LM")
        source, target = tokens(2, 6), tokens(2, 5, seed=1)
        changed = target.clone()
        changed[:, 3:] = tokens(2, 2, seed=8)
        before, after = (model(input_ids=source, labels=labels).logits[:, :4] for labels in (target, changed))
        close(after, before)

    @pytest.mark.support("gradient checkpointing")
    def test_gradient_checkpointing(self, name):
        model = para(name, task_type="SEQ_2_SEQ_LM").train()
        source, target = tokens(2, 6), tokens(2, 5, seed=1)

        def gradients():
            model.zero_grad()
            (model(input_ids=source, labels=target).loss + model(input_ids=target, labels=source).loss).backward()
            return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

        expected = gradients()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for key, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with pytest.raises(ValueError, match="'use_reentrant': False"):
            model(input_ids=source, labels=target)


@pytest.mark.support("speech models")
@torch.no_grad()
def test_whisper():
    torch.manual_seed(0)
    config = tf.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=12, max_target_positions=32)
    base = tf.WhisperForConditionalGeneration(config).eval()
    features, target = torch.randn(2, 8, 24), tokens(2, 5)
    expected = base(input_features=features, decoder_input_ids=target).logits
    model = get_peft_model(base, ParaConfig()).eval()
    close(model(input_features=features, decoder_input_ids=target).logits, expected)
    randomize(model)
    logits = model(input_features=features, decoder_input_ids=target).logits
    assert (logits - expected).abs().max() > 1e-3
    encoded = model.get_base_model().get_encoder()(features)
    cache, steps = None, []
    for i in range(5):
        out = model.get_base_model()(
            encoder_outputs=encoded, decoder_input_ids=target[:, i : i + 1], past_key_values=cache
        )
        cache = out.past_key_values
        steps.append(out.logits)
    close(torch.cat(steps, 1), logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["T5EncoderModel", "T5ForSequenceClassification", "BartForSequenceClassification"])
def test_parts_and_heads_of_encoder_decoder_models(name):
    config_class, fields = SEQ2SEQ["t5" if name.startswith("T5") else "bart"]
    torch.manual_seed(0)
    base = getattr(tf, name)(config_class(**fields)).eval()
    ids = tokens()
    ids[:, -1] = 2
    expected = base(input_ids=ids)[0]
    model = get_peft_model(base, ParaConfig()).eval()
    assert torch.equal(model(input_ids=ids)[0], expected)
    assert not torch.equal(randomize(model)(input_ids=ids)[0], expected)


@torch.no_grad()
def test_a_whisper_encoder_that_classifies():
    torch.manual_seed(0)
    config = tf.WhisperConfig(**ENCODER_DECODER, num_mel_bins=8, max_source_positions=12)
    base, features = tf.WhisperForAudioClassification(config).eval(), torch.randn(2, 8, 24)
    expected = base(features).logits
    model = get_peft_model(base, ParaConfig()).eval()
    assert torch.equal(model(features).logits, expected)
    assert not torch.equal(randomize(model)(features).logits, expected)


@pytest.mark.support("experts of a mixture as targets", refused=True)
@torch.no_grad()
def test_a_layer_that_sees_some_of_the_tokens_is_refused():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up_proj = nn.Linear(16, 16)

        def forward(self, x):
            return x + self.up_proj(x[:, ::2].reshape(-1, 16)).mean()

    base = tiny("llama")
    base.model.layers[0].mlp = Expert()
    model = get_peft_model(base, ParaConfig(init_para_weights=False)).eval()
    with pytest.raises(ValueError, match=r"up_proj received a tensor of shape \(8, 16\) in a call of 2 rows"):
        model(tokens())


@pytest.mark.support("multimodal models")
@torch.no_grad()
def test_the_vision_tower_of_gemma_3_is_left_alone():
    text = tf.Gemma3TextConfig(**{**CAUSAL["gemma3_text"][1], "vocab_size": 300})
    vision = {**SIZES, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14}
    config = tf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=299)
    torch.manual_seed(0)
    model = randomize(
        get_peft_model(tf.Gemma3ForConditionalGeneration(config), ParaConfig(task_type="CAUSAL_LM"))
    ).eval()
    assert len(para_layers(model)) == 9 and all("language_model" in layer.name for layer in para_layers(model))
    ids = tokens(1, 6)
    ids[0, 2] = 299
    pixels = torch.randn(1, 3, 28, 28)
    types = (ids == 299).long()
    generated = generate(model, ids, pixel_values=pixels, token_type_ids=types)
    again = generate(model, ids, pixel_values=pixels, token_type_ids=types, use_cache=False)
    assert generated.sequences.tolist() == again.sequences.tolist()


@pytest.mark.support("models that are not from transformers")
@torch.no_grad()
def test_a_plain_module():
    """Where there are no blocks, each target is one by itself, and its whole input is the prompt."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    x = torch.randn(3, 8)
    expected = base(x)
    model = inject_adapter_in_model(ParaConfig(target_modules=["0", "2"]), base)
    close(model(x), expected)
    randomize(model)
    assert (model(x) - expected).abs().max() > 1e-3
    close(model(x[:1]), model(x)[:1])
