"""PARA's tenants on one backbone: a decoding step is one multiplication per target, for any number of tenants."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from integration_tests.helpers.counting import Products, PythonCalls, tensor_bytes
from integration_tests.helpers.models import generate, leading, para, randomize, tiny, tokens
from peft_fanlora import ParaConfig, load_tenant
from peft_fanlora.para.layer import ParaLayer
from peft_fanlora.serving.tenants import BASE_ROWS


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    para().save_pretrained(tmp_path)
    return tmp_path


def serving(saved: Path) -> nn.Module:
    return PeftModel.from_pretrained(tiny("llama"), saved, adapter_name="t0")


@pytest.mark.support("mixed batches (`adapter_names`)")
@pytest.mark.parametrize("method", ["PARA"])
def test_a_step_is_one_multiplication_in_place_for_each_target(method: str) -> None:
    model = para()
    for tenant in range(32):
        model.add_adapter(f"t{tenant}", ParaConfig(r=2 + tenant % 3, task_type="CAUSAL_LM"))
        randomize(model, f"t{tenant}", seed=tenant)
    model.eval()
    counts = {}
    for num_tenants in (1, 8, 32):
        batch = tokens(32, 6)
        names = [f"t{row % num_tenants}" for row in range(32)]
        with torch.inference_mode():
            prompt, token = batch.split((5, 1), 1)
            cache = model(prompt, adapter_names=names).past_key_values
            with Products() as own:
                step = model(token, adapter_names=names, past_key_values=cache).logits
        counts[num_tenants] = own.counts
        for row in (0, 7, 31):
            model.set_adapter(names[row])
            with torch.inference_mode():
                whole = model(batch[row : row + 1], prompt_mask=leading(batch[row : row + 1], 5)).logits
            torch.testing.assert_close(step[row, 0], whole[0, -1], rtol=1e-5, atol=1e-5)
    assert counts[1] == counts[8] == counts[32]
    with torch.inference_mode(), model.disable_adapter():
        cache, token = model(tokens(32, 5)).past_key_values, tokens(32, 1)
        with Products() as base:
            model(token, past_key_values=cache)
    assert counts[32] - base.counts == {"mul_": 3 * 3}


@pytest.mark.support("mixed batches (`adapter_names`)")
@pytest.mark.parametrize("method", ["PARA"])
@torch.no_grad()
def test_each_row_has_the_vectors_of_its_own_generators(method: str) -> None:
    """Generators of one kind run together; what differs in anything, or is waited for by a hook, does not."""
    model = para()
    randomize(model)
    kinds = [
        *[{}] * 3,
        *[{"activation": "rational", "pooling": "mean"}] * 2,
        *[{"target_modules": ["up_proj"]}] * 2,
        *[{"target_modules": ["q_proj", "up_proj"], "pooling": "max"}] * 2,
        {"r": 5},
        *[{"activation": "prelu"}] * 2,  # an activation with a parameter
    ]
    for tenant, kind in enumerate(kinds):
        model.add_adapter(f"t{tenant}", ParaConfig(**{"r": 3, "task_type": "CAUSAL_LM", **kind}))
        randomize(model, f"t{tenant}", seed=tenant)
    seen = []
    for module in model.modules():
        if isinstance(module, ParaLayer) and "t1" in module.para_generator:
            module.para_generator["t1"].register_forward_hook(lambda *call: seen.append(call))
            module.para_generator["t4"].activation.numerator.mul_(3)
            module.para_generator["t10"].activation.weight.fill_(4)
    model.eval()
    names = [BASE_ROWS, *(f"t{tenant}" for tenant in range(len(kinds))), "t2", "t4", "t1"]
    batch = tokens(len(names), 6)
    for order in (list(range(len(names))), [1, 2, 3, 11], [6, 7], [2]):
        mixed = model(batch[order], adapter_names=[names[row] for row in order]).logits
        for place, row in enumerate(order):
            if names[row] == BASE_ROWS:
                with model.disable_adapter():
                    alone = model(batch[row : row + 1]).logits
            else:
                model.set_adapter(names[row])
                alone = model(batch[row : row + 1]).logits
            torch.testing.assert_close(mixed[place : place + 1], alone, rtol=1e-5, atol=1e-5)
    assert seen


@torch.no_grad()
def test_a_prompt_takes_no_more_operations_with_more_tenants(saved: Path) -> None:
    model = serving(saved)
    for tenant in range(1, 32):
        load_tenant(model, saved, f"t{tenant}")
    model(tokens(32, 6), adapter_names=["t0", "t1"] * 16)  # the first mixed batch finds out where layers see the rows
    counts = []
    for num_tenants in (2, 8, 32):
        with Products() as prefill:
            model(tokens(32, 6), adapter_names=[f"t{row % num_tenants}" for row in range(32)])
        counts.append({name: count for name, count in prefill.counts.items() if name != "detach"})
    assert counts[0] == counts[1] == counts[2]


def test_neither_a_step_nor_a_change_costs_more_with_more_tenants(saved: Path) -> None:
    model = serving(saved)
    batch, names, costs = tokens(4, 5), ["t1", "t0", BASE_ROWS, "t2"], {}
    load_tenant(model, saved, "t-1")
    model(batch, adapter_names=["t0", "t-1"] * 2)  # the first mixed batch finds out where layers see the rows
    model.delete_adapter("t-1")
    for tenant in range(1, 61):
        with PythonCalls() as loading:
            load_tenant(model, saved, f"t{tenant}")
        if tenant in (10, 60):
            with torch.no_grad():
                with PythonCalls() as prefill:
                    cache = model(batch, adapter_names=names).past_key_values
                with PythonCalls() as step:
                    model(batch[:, :1], adapter_names=names, past_key_values=cache)
            model.add_adapter("more", ParaConfig(r=2, task_type="CAUSAL_LM"))
            with PythonCalls() as deleting:
                model.delete_adapter("more")
            costs[tenant] = (prefill.count, step.count, deleting.count, loading.count)
    *calls, load = zip(costs[10], costs[60], strict=True)
    for few, many in calls:
        assert many <= few * 1.01
    assert load[1] <= load[0] + 10 * 50  # PEFT compares the `bias` of all configurations


def test_a_tenant_takes_the_memory_of_its_adapter_and_frees_it(saved: Path) -> None:
    model = serving(saved)
    load_tenant(model, saved, "t1")
    before = tensor_bytes()
    size = sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, adapter_name="t1").values())
    for tenant in range(2, 22):
        load_tenant(model, saved, f"t{tenant}")
    assert tensor_bytes() - before == pytest.approx(20 * size, rel=0.05)
    for tenant in range(2, 22):
        model.delete_adapter(f"t{tenant}")
    assert tensor_bytes() == before


def test_tenants_change_between_the_calls_of_a_serving_loop(saved: Path, tmp_path: Path) -> None:
    model = serving(saved)
    other = para(seed=0)
    randomize(other, seed=9)
    other.save_pretrained(tmp_path / "other")
    batch = tokens(2, 5)
    alone = {}
    for source in (saved, tmp_path / "other"):
        load_tenant(model, source, "guest")
        model.set_adapter("guest")
        alone[source] = generate(model, batch[:1]).sequences
        model.set_adapter("t0")
        mixed = generate(model, batch, adapter_names=["guest", "t0"], num_beams=1).sequences
        assert torch.equal(mixed[:1], alone[source])
        assert torch.equal(mixed[1:], generate(model, batch[1:]).sequences)
        model.delete_adapter("guest")
    assert not torch.equal(*alone.values())
