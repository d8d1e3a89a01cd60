"""Training: the prompt never includes the answer, gradients are those of the forward pass, and nothing else trains."""

import copy
import io

import pytest
import torch
from peft import get_peft_model

from integration_tests.helpers.models import CAUSAL, para, randomize, tiny, tokens
from peft_fanlora import ParaConfig
from peft_fanlora.para.core.generator import POOLINGS


ALL = sorted(CAUSAL)
SOME = ["llama", "gpt2", "gemma3_text", "gpt_neox", "opt", "phi3", "qwen3"]


def labelled(batch: torch.Tensor, prompt: int = 4) -> torch.Tensor:
    labels = batch.clone()
    labels[:, :prompt] = -100
    return labels


def gradients(model, *losses):
    model.zero_grad()
    sum(losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same_gradients(actual, expected):
    assert actual.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(
            actual[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4


@pytest.mark.support("forward")
@pytest.mark.parametrize("name", ALL)
def test_a_fresh_adapter_changes_no_logit(name):
    base = tiny(name)
    batch = tokens()
    expected = base(batch).logits.detach()
    model = get_peft_model(base, ParaConfig(task_type="CAUSAL_LM"))
    assert torch.equal(model.eval()(batch).logits, expected)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_answer_tokens_change_no_logit_before_them(name, pooling):
    """Guards against pooling over the answer, which leaks it into the logits that should predict it."""
    model = para(name, pooling=pooling).train()
    batch = tokens(2, 9)
    labels = labelled(batch)
    changed = batch.clone()
    changed[:, 6:] = tokens(2, 3, seed=5)
    assert not torch.equal(batch, changed)
    before, after = (model(ids, labels=labelled(ids)).logits[:, :6] for ids in (batch, changed))
    torch.testing.assert_close(after, before, atol=1e-6, rtol=1e-5)
    del labels


@pytest.mark.support("gradient checkpointing")
@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(name, reentrant):
    """Guards against a prompt that is forgotten when a block runs again in the backward pass.

    Hooks that last for one forward are gone by then: the block ran unscaled, and the gradient norm rose silently.
    """
    batches = [tokens(2, 9), tokens(3, 8, seed=4)]

    def losses(model):
        return [model(batch, labels=labelled(batch, 3 + i)).loss for i, batch in enumerate(batches)]

    model = para(name).train()
    expected = [loss.item() for loss in losses(model)]
    plain = [gradients(model, *losses(model)[:1]), gradients(model, *losses(model))]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed = losses(model)
    assert [loss.item() for loss in checkpointed] == pytest.approx(expected)
    # Two forwards come before the one backward: each has to see its own prompt again.
    same_gradients(gradients(model, *checkpointed), plain[1])
    same_gradients(gradients(model, *losses(model)[:1]), plain[0])


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_finite_differences(packed):
    model = para("gpt2", r=2).double().train()  # Llama's norms compute in float32, whatever the model's dtype
    batch = tokens(1, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]) if packed else None
    labels = batch.clone()
    labels[:, [0, 1, 4, 5] if packed else [0, 1, 2]] = -100

    def loss():
        logits = model(batch, labels=labels, position_ids=positions, use_cache=False).logits
        return logits.logsumexp(-1).mean()

    analytic = gradients(model, loss())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            direction = torch.randn_like(parameter)
            step = 1e-4
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
            slope = (above - below) / (2 * step)
            torch.testing.assert_close(slope, (analytic[name] * direction).sum(), atol=1e-5, rtol=1e-3)


@pytest.mark.support("training")
def test_only_the_adapter_trains():
    model = para().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert all(("para_" in name) == p.requires_grad for name, p in model.named_parameters())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(2):
        batch = tokens()
        model(batch, labels=labelled(batch)).loss.backward()
        optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if "para_" in name}


@pytest.mark.support("training without an indication of where the prompt ends", refused=True)
def test_training_without_a_known_prompt_raises():
    """Guards against the silent fallback to "everything is prompt", which trains on leaked answers."""
    model = para().train()
    batch = tokens()
    plain_text = batch.clone()
    lone = plain_text.clone()
    lone[:, 0] = -100
    for labels in (plain_text, lone, None):
        with pytest.raises(ValueError, match="cannot tell where the prompt ends in 2 of 2") as error:
            model(batch, labels=labels)
        for remedy in ("prompt_mask", "get_prompt_end_token_ids(tokenizer)", "prompt-completion"):
            assert remedy in str(error.value)
    model.eval()
    for labels in (plain_text, None):
        model(batch, labels=labels)
    with model.disable_adapter():
        model.train()(batch, labels=plain_text)
    model.train().generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=2)


@pytest.mark.support("`copy.deepcopy` and pickling")
@pytest.mark.parametrize("pickled", [False, True])
def test_a_copy_is_a_model_of_its_own(pickled):
    """Guards against graph tensors kept on modules, which cannot be copied, and against a copy that shares state."""
    model = para().train()
    batch = tokens()
    if not pickled:  # transformers' own hook for checkpointing cannot be pickled
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss = model(batch, labels=labelled(batch)).loss
    if pickled:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        copied = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    else:
        copied = copy.deepcopy(model)
    loss.backward()
    same_gradients(
        gradients(copied, copied(batch, labels=labelled(batch)).loss),
        gradients(model, model(batch, labels=labelled(batch)).loss),
    )
    randomize(copied, seed=11)
    model.eval(), copied.eval()
    both = [
        m.generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=6) for m in (model, copied)
    ]
    assert both[0].tolist() != both[1].tolist()
    assert torch.equal(
        both[0], model.generate(input_ids=batch, attention_mask=torch.ones_like(batch), max_new_tokens=6)
    )


@pytest.mark.support("autocast")
def test_autocast_trains():
    model = para().train()
    batch = tokens()
    expected = gradients(model, model(batch, labels=labelled(batch)).loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(batch, labels=labelled(batch)).loss
    actual = gradients(model, loss)
    for name, gradient in expected.items():
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), actual[name].flatten(), 0) > 0.9, name


def test_a_cache_made_while_training():
    """A training step with `use_cache=True` leaves a cache whose next step has gradients too."""
    model = para().train()
    batch = tokens()
    out = model(batch, labels=labelled(batch), use_cache=True)
    model(
        batch[:, :1], past_key_values=out.past_key_values, prompt_mask=torch.zeros(2, 1, dtype=torch.bool)
    ).logits.sum().backward()


def test_dropout_is_the_same_when_a_block_runs_again():
    model = para(para_dropout=0.5).train()
    batch = tokens()

    def gradient():
        torch.manual_seed(0)
        return gradients(model, model(batch, labels=labelled(batch)).loss)

    expected = gradient()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    same_gradients(gradient(), expected)
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            expected.values(), gradients(model, model(batch, labels=labelled(batch)).loss).values(), strict=True
        )
    )


@pytest.mark.support("torch.nn.DataParallel", refused=True)
@pytest.mark.parametrize("method", ["PARA"])
def test_replicas_of_data_parallel_are_refused(method):
    """They run in threads on one shared state, where nothing tells the parts of a batch from each other."""
    replica = para().get_base_model()._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"torch\.nn\.DataParallel.*accelerate launch"):
        replica(tokens())
