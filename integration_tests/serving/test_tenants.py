"""Tenants that come and go on one backbone: what each costs, and that the others do not notice."""

import copy
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

from integration_tests.helpers.counting import PythonCalls, tensor_bytes
from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from integration_tests.helpers.tenants import alone, tenants
from peft_fanlora import FanLoraConfig, load_tenant
from peft_fanlora.serving.tenants import BASE_ROWS


def saved_bytes(model: PeftModel, name: str) -> int:
    return sum(tensor.nbytes for tensor in get_peft_model_state_dict(model, adapter_name=name).values())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved adapter of two modules per layer."""
    model = fanlora(target_modules=["v_proj", "up_proj"])
    model.save_pretrained(tmp_path)
    return tmp_path


def serving(saved: Path) -> PeftModel:
    return PeftModel.from_pretrained(TINY["llama"].base(), saved, adapter_name="t0")


def test_neither_a_step_nor_a_change_costs_more_with_more_tenants(saved: Path) -> None:
    model = serving(saved)
    batch = TINY["llama"].batch(rows=4)
    names, costs = ["t1", "t0", BASE_ROWS, "t2"], {}
    for tenant in range(1, 61):
        with PythonCalls() as loading:
            load_tenant(model, saved, f"t{tenant}")
        if tenant in (10, 60):
            logits(model, {**batch, "adapter_names": names})
            with PythonCalls() as step:
                logits(model, {**batch, "adapter_names": names})
            model.add_adapter("more", FanLoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
            with PythonCalls() as deleting:
                model.delete_adapter("more")
            costs[tenant] = (loading.count, step.count, deleting.count)
    for few, many in zip(costs[10], costs[60], strict=True):
        # PEFT compares the `bias` of all configurations, a few calls a tenant.
        assert many <= few + 10 * 50


def test_a_tenant_takes_the_memory_of_its_adapter_and_frees_it(saved: Path) -> None:
    model = serving(saved)
    load_tenant(model, saved, "t1")
    before, size = tensor_bytes(), saved_bytes(model, "t1")
    for tenant in range(2, 22):
        load_tenant(model, saved, f"t{tenant}")
    assert tensor_bytes() - before == pytest.approx(20 * size, rel=0.05)
    names = [f"t{tenant}" for tenant in range(2, 10)]
    logits(model, {**TINY["llama"].batch(rows=8), "adapter_names": names})
    assert tensor_bytes() - before < (20 + 2 * len(names)) * size  # the last batch's stacks
    for tenant in range(2, 22):
        model.delete_adapter(f"t{tenant}")
    assert tensor_bytes() == before


def test_load_tenant_does_what_load_adapter_does(saved: Path) -> None:
    ours, plain = serving(saved), serving(saved)
    for model in (ours, plain):
        model.add_adapter("more", FanLoraConfig(r=3, lora_dropout=0.5, task_type="CAUSAL_LM"))
        model.base_model.set_requires_grad("more")
        model.train()
    load_tenant(ours, saved, "new")
    plain.load_adapter(saved, "new")
    assert {name: (p.requires_grad, p.shape) for name, p in ours.named_parameters()} == {
        name: (p.requires_grad, p.shape) for name, p in plain.named_parameters()
    }
    assert {name: module.training for name, module in ours.named_modules()} == {
        name: module.training for name, module in plain.named_modules()
    }
    assert ours.active_adapters == plain.active_adapters == ["t0"]
    found, expected = (get_peft_model_state_dict(model, adapter_name="new") for model in (ours, plain))
    assert all(torch.equal(found[key], expected[key]) for key in expected | found)
    plain.load_state_dict(ours.state_dict())  # has the same keys


def test_the_order_of_the_weights_stays_that_of_loading(saved: Path) -> None:
    model = serving(saved)
    for name in ("b", "a"):
        load_tenant(model, saved, name)
    load_tenant(model, saved, "b")  # over the same name
    assert sorted(model.base_model.model.model.layers[0].mlp.up_proj.lora_A) == ["a", "b", "t0"]


def test_a_load_that_fails_leaves_the_tenants_alone(saved: Path, tmp_path: Path) -> None:
    model = serving(saved)
    load_tenant(model, saved, "t1")
    before = copy.deepcopy(model.state_dict())
    fanlora(target_modules=["v_proj", "up_proj"], r=2).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter("t1", FanLoraConfig(task_type="CAUSAL_LM"))
    with pytest.raises(RuntimeError, match="size mismatch"):
        load_tenant(model, tmp_path / "narrow", "t1")
    with pytest.raises((ValueError, OSError)):
        load_tenant(model, tmp_path / "nowhere", "t2")
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert set(model.peft_config) == {"t0", "t1"}


def test_tenants_change_between_the_steps_of_a_serving_loop(tmp_path: Path) -> None:
    model = tenants()
    model.save_pretrained(tmp_path)
    batch = TINY["llama"].batch(rows=3)
    for turn in range(4):
        load_tenant(model, tmp_path / ("two" if turn % 2 else "three"), "guest")
        names = ["guest", "default", "two" if turn < 2 else BASE_ROWS]
        mixed = logits(model, {**batch, "adapter_names": names})
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], alone(model, batch, row, name), rtol=1e-5, atol=1e-5)
        model.delete_adapter("guest")
        with pytest.raises(ValueError, match=r"non-existing adapter\(s\): guest"):
            model(**batch, adapter_names=names)


def test_deleting_the_active_adapter_activates_another_as_in_peft() -> None:
    model = tenants()
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("default")
    (active,) = model.active_adapters
    assert active in ("two", "three")
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all(f".{active}." in name for name in trainable)


def test_loading_waits_for_the_calls_of_other_threads(saved: Path) -> None:
    model = serving(saved)
    inside, go_on, order = threading.Event(), threading.Event(), []

    def wait(*_: Any) -> None:
        inside.set()
        go_on.wait(10)

    handle = model.base_model.model.model.layers[0].register_forward_hook(wait)
    ids = TINY["llama"].batch(rows=1)["input_ids"]
    call = threading.Thread(target=lambda: (logits(model, {"input_ids": ids}), order.append("call")))
    call.start()
    inside.wait(10)
    load = threading.Thread(target=lambda: (load_tenant(model, saved, "new"), order.append("load")))
    load.start()
    load.join(0.2)
    assert load.is_alive()
    go_on.set()
    load.join(30)
    call.join(30)
    assert order == ["call", "load"]
    handle.remove()
    model.base_model.model.register_forward_pre_hook(lambda *_: load_tenant(model, saved, "inner"))
    with pytest.raises(RuntimeError, match="change them between calls"):
        logits(model, {"input_ids": ids})


def test_other_models_are_refused(saved: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(TINY["llama"].base(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"this one has LoraModel: use model\.load_adapter"):
        load_tenant(model, saved, "t1")


def test_a_fresh_tenant_is_on_the_modules_of_its_own(saved: Path) -> None:
    model = serving(saved)
    model.add_adapter("all", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model)
    model.eval()
    layer: Any = model.base_model.model.model.layers[0].mlp
    assert isinstance(layer.gate_proj, nn.Module)
    assert list(layer.gate_proj.lora_A) == ["all"]
    assert list(layer.up_proj.lora_A) == ["t0", "all"]
