"""The configuration's errors, the generator's mathematics, and the chat template helper."""

import json

import pytest
import torch
import transformers as tf
from peft import PeftConfig, PeftType, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from integration_tests.helpers.models import para, tiny
from peft_fanlora import ParaConfig, ParaModel, get_prompt_end_token_ids
from peft_fanlora.para import VectorGenerator
from peft_fanlora.para.core.generator import POOLINGS, RationalActivation, pool, rational, rms_normalise


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 is not a width.*r=12"),
        ({"r": 2.5}, r"r=2.5 is not a width"),
        ({"pooling": "sum"}, r"pooling='sum' is unknown: choose one of 'attention', 'mean', 'max', 'last'"),
        ({"activation": "gleu"}, r"activation='gleu' is unknown.*'rational'.*ACT2FN"),
        ({"para_dropout": 1.0}, r"para_dropout=1.0 is not a probability below 1"),
        ({"para_dropout": -0.1}, r"para_dropout=-0.1"),
        ({"prompt_end_token_ids": []}, r"prompt_end_token_ids=\[\] is not a list of token ids"),
        ({"prompt_end_token_ids": "</s>"}, r"prompt_end_token_ids='</s>'.*tokenizer.encode"),
        ({"prompt_end_token_ids": 5}, r"prompt_end_token_ids=5"),
        ({"prompt_end_token_ids": [1, -2]}, r"prompt_end_token_ids=\[1, -2\]"),
        ({"layers_pattern": "layers"}, r"`layers_to_transform` must also be.*layers_pattern='layers' has no effect"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            r"layers_to_transform=\[0\].*target_modules='\.\*q_proj'",
        ),
    ],
)
def test_errors_name_the_value_the_reason_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        ParaConfig(**fields)


def test_an_unknown_architecture_is_shown_an_example():
    base = tf.AutoModelForCausalLM.from_config(
        tf.CTRLConfig(vocab_size=20, n_embd=16, dff=16, n_layer=1, n_head=2, n_positions=16)
    )
    with pytest.raises(
        ValueError, match=r"Please specify `target_modules`.*the architecture 'ctrl'.*target_modules=\['q_proj'"
    ):
        get_peft_model(base, ParaConfig())


def test_every_field_is_explained():
    own = set(ParaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert {"r", "target_modules", "pooling", "activation", "prompt_end_token_ids", "para_dropout"} <= own
    for name in own:
        assert ParaConfig.__dataclass_fields__[name].metadata["help"], name
        assert f"        {name}: " in ParaConfig.__doc__, name


def test_the_config_survives_json(tmp_path):
    config = ParaConfig(
        r=5, target_modules=["a", "b"], prompt_end_token_ids=(3, 4), layers_to_transform=[0], layers_pattern="layers"
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PARA"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ParaConfig) and loaded.peft_type is PeftType.PARA
    assert (loaded.r, loaded.target_modules, loaded.prompt_end_token_ids) == (5, {"a", "b"}, [3, 4])


def test_peft_knows_the_method():
    assert PeftType.PARA in list(PeftType) and ParaModel.prefix == "para_"


def test_layers_to_transform_and_exclude_modules():
    model = get_peft_model(tiny("llama"), ParaConfig(layers_to_transform=[1], exclude_modules=["q_proj"]))
    assert sorted(model.base_model.targeted_module_names) == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    every = get_peft_model(tiny("llama"), ParaConfig(target_modules="all-linear"))
    assert len(every.base_model.targeted_module_names) == 21


def test_random_initial_vectors():
    torch.manual_seed(0)
    base = tiny("llama")
    ids = torch.randint(3, 60, (2, 6))
    expected = base(ids).logits
    model = get_peft_model(base, ParaConfig(init_para_weights=False)).eval()
    assert (model(ids).logits - expected).abs().max() > 1e-3


# The generator ----------------------------------------------------------------------------------------------------


def naive_pool(hidden, mask, pooling, query):
    """Loops over rows and sequences."""
    out = torch.zeros(mask.shape[0], mask.shape[1], hidden.shape[-1])
    for b in range(mask.shape[0]):
        for s in range(mask.shape[1]):
            h = hidden[b][mask[b, s]]
            if not len(h):
                continue
            weights = (h @ query / query.numel() ** 0.5).softmax(0)
            out[b, s] = {
                "attention": (weights[:, None] * h).sum(0),
                "mean": h.mean(0),
                "max": h.amax(0),
                "last": h[-1],
            }[pooling]
    return out


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_against_a_loop(pooling):
    torch.manual_seed(0)
    hidden, mask, query = torch.randn(3, 9, 4), torch.rand(3, 2, 9) > 0.5, torch.randn(4)
    mask[1, 0] = False
    torch.testing.assert_close(pool(hidden, mask, pooling, query), naive_pool(hidden, mask, pooling, query))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_what_is_no_prompt_may_be_anything(pooling):
    """Guards against NaN in padding, which a weight of zero does not remove."""
    hidden, mask = torch.randn(1, 4, 3), torch.tensor([[[True, True, False, False]]])
    expected = pool(hidden, mask, pooling, torch.ones(3))
    hidden[0, 2:] = float("nan")
    torch.testing.assert_close(pool(hidden, mask, pooling, torch.ones(3)), expected)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_long_prompts_in_bfloat16(pooling):
    """Guards against a bfloat16 sum, which stops growing after a few hundred tokens."""
    torch.manual_seed(0)
    hidden = (torch.randn(1, 32_768, 8) + 1).bfloat16()
    mask = torch.ones(1, 1, 32_768, dtype=torch.bool)
    query = torch.randn(8) * 0.1
    expected = pool(hidden.double(), mask, pooling, query.double())
    torch.testing.assert_close(pool(hidden, mask, pooling, query).double(), expected, atol=1e-4, rtol=1e-4)


def test_the_generators_equation():
    torch.manual_seed(0)
    generator = VectorGenerator(6, 3, "mean", nn.SiLU())
    generator.add_target("q", 5, identity=False)
    generator.add_target("u", 7)
    hidden, mask = torch.randn(2, 4, 6), torch.ones(2, 1, 4, dtype=torch.bool)
    vectors = generator(hidden, mask)
    pooled = hidden.mean(1)
    pooled = pooled / (pooled.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    expected = 1 + torch.nn.functional.silu(pooled @ generator.down.T / 6**0.5) @ generator.up_q.T
    torch.testing.assert_close(vectors["q"][:, 0], expected)
    assert torch.equal(vectors["u"], torch.ones(2, 1, 7))


def test_rms_normalise():
    assert torch.equal(rms_normalise(torch.zeros(2, 3)), torch.zeros(2, 3))
    assert rms_normalise(torch.randn(5, 64) * 100).square().mean(-1).allclose(torch.ones(5), atol=1e-3)


def test_the_rational_activation_starts_as_gelu():
    x = torch.linspace(-10, 10, 2001)
    assert (RationalActivation()(x) - torch.nn.functional.gelu(x)).abs().max() < 0.006


def test_the_rational_activation_has_finite_gradients_everywhere():
    activation = RationalActivation()
    with torch.no_grad():
        activation.denominator.copy_(torch.tensor([3.0, -5.0, 2.0, 1.0, -4.0]))
    x = torch.tensor(
        [0.0, -0.0, 1e-30, 1.0, -1.0, 1e3, -1e3, 1e20, -1e38, float("inf"), -float("inf")], requires_grad=True
    )
    activation(x).sum().backward()
    for value in (x.grad, activation.numerator.grad, activation.denominator.grad):
        assert value.isfinite().all()


def test_the_rational_activations_gradient():
    x = torch.randn(6, dtype=torch.double, requires_grad=True)
    a = torch.randn(7, dtype=torch.double, requires_grad=True)
    b = torch.randn(5, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(rational, (x, a, b))


@pytest.mark.parametrize("activation", ["gelu", "relu", "silu", "tanh", "gelu_new", "rational", "sigmoid"])
def test_any_activation_starts_as_the_identity(activation):
    base = tiny("llama")
    ids = torch.randint(3, 60, (2, 6))
    expected = base(ids).logits
    assert torch.equal(get_peft_model(base, ParaConfig(activation=activation)).eval()(ids).logits, expected)


def test_a_bfloat16_model_keeps_its_dtype():
    model = para().to(torch.bfloat16)
    assert model(torch.randint(3, 60, (1, 5))).logits.dtype == torch.bfloat16


# The chat template ------------------------------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} \n {{ m.content }} <|im_end|> \n {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)
THINKING = CHATML.replace("assistant \n {% endif", "assistant \n <think> {% endif")
INST = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] {% else %}{{ m.content }} {% endif %}{% endfor %}"
NOTHING = "{% for m in messages %}{{ m.content }} {% endfor %}"


def tokenizer(template):
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "<think>", "[INST]", "[/INST]"]
    words += ["How", "far", "is", "the", "sun", "?", "Name", "three", "rivers", "Eight", "minutes", "of", "light", "."]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, unk_token="<unk>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|> <|im_start|> assistant"),
        (THINKING, "<|im_end|> <|im_start|> assistant"),
        (INST, "[/INST]"),
    ],
)
def test_the_end_of_a_prompt_is_read_from_the_chat_template(template, expected):
    tok = tokenizer(template)
    assert tok.convert_ids_to_tokens(get_prompt_end_token_ids(tok)) == expected.split()


def test_templates_without_an_end_are_refused():
    with pytest.raises(ValueError, match="puts no tokens of its own between a prompt and its answer"):
        get_prompt_end_token_ids(tokenizer(NOTHING))
    with pytest.raises(ValueError, match="has no chat template"):
        get_prompt_end_token_ids(tokenizer(None))
