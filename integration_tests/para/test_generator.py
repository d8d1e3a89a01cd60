"""The generator's equation: pooling, activations and their gradients."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from integration_tests.helpers.models import para, tiny
from peft_fanlora import ParaConfig
from peft_fanlora.para.core.generator import (
    POOLINGS,
    RationalActivation,
    VectorGenerator,
    pool,
    rational,
    rms_normalise,
)


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
