"""Threads that share a model: calls see their own rows, and changes wait for calls."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification

from integration_tests.helpers.models import TINY, fanlora, para, randomize
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig
from peft_fanlora.serving.gate import CallGate


pytestmark = pytest.mark.usefixtures("often_switched_threads")


def classifier(method: str) -> PeftModel:
    """Two tenants, each with a head of its own."""
    base = LlamaForSequenceClassification(TINY["llama"].base(num_labels=3).config)
    config = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}[method]
    model = get_peft_model(base, config(r=2, task_type="SEQ_CLS"))
    model.add_adapter("two", config(r=2, task_type="SEQ_CLS"))
    if method == "FanLoRA":
        randomize(model)
    else:
        randomize(randomize(model), "two", seed=5)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_overlapping_calls_each_take_their_own_head(method: str) -> None:
    """Hooks on `modules_to_save` for the length of a call gave one tenant the other's head."""
    model = classifier(method)
    ids = TINY["llama"].batch(rows=2)["input_ids"]
    orders = (["default", "two"], ["two", "default"])

    def scores(names: list[str]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, adapter_names=names).logits

    expected = [scores(names) for names in orders]
    assert (expected[0] - expected[1]).abs().max() > 0.01
    wrong: list[str] = []
    meeting = threading.Barrier(2)

    def serve(index: int) -> None:
        meeting.wait()
        found = (scores(orders[index]) for _ in range(40))
        wrong.extend(orders[index][0] for own in found if not torch.equal(own, expected[index]))

    workers = [threading.Thread(target=serve, args=(index,)) for index in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_calls_leave_as_many_hooks_as_the_first_one(method: str) -> None:
    model = classifier(method)
    ids = TINY["llama"].batch(rows=2)["input_ids"]
    numbers = []
    for _ in range(3):
        model(input_ids=ids, adapter_names=["default", "two"])
        numbers.append(sum(len(module._forward_pre_hooks) for module in model.modules()))
    assert len(set(numbers)) == 1


def prune(model: PeftModel) -> None:
    model.prune_modules(FanLoraSetting.from_modules(model.base_model.model, ["model.layers.0.mlp.up_proj"]))


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "prune_modules": prune,
    "score_modules": lambda model: model.score_modules([TINY["llama"].batch()], "sensitivity", progress=False),
    "set_adapter": lambda model: model.set_adapter("two"),
    "merge_adapter": lambda model: model.merge_adapter(),
    "disable_adapter_layers": lambda model: model.base_model.disable_adapter_layers(),
    "delete_adapter": lambda model: model.delete_adapter("default"),
    "unload": lambda model: model.unload(),
}


def check_waits(model: PeftModel, change: Callable[[PeftModel], Any]) -> None:
    """Makes a change while another thread generates: it comes after the last token, and the tokens are the same."""
    ids, tokens, outputs = TINY["llama"].batch(rows=2)["input_ids"], [], []
    running, changed = threading.Event(), threading.Event()
    options = {"input_ids": ids, "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = model.generate(**options)

    def wait(*args: Any) -> None:
        if threading.current_thread() is worker:
            tokens.append(None)
            running.set()
            changed.wait(0.2)  # time for the change to come too early

    handle = model.base_model.model.lm_head.register_forward_hook(wait)
    worker = threading.Thread(target=lambda: outputs.append(model.generate(**options)))
    worker.start()
    running.wait()
    change(model)
    number = len(tokens)
    changed.set()
    worker.join()
    handle.remove()
    assert number == 6
    assert outputs[0].equal(expected)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_waits_for_the_generation_of_another_thread(change: str) -> None:
    """Pruning in the middle of another thread's generation changed its tokens."""
    model = fanlora()
    model.add_adapter("two", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model)
    check_waits(model, CHANGES[change])


@pytest.mark.parametrize("change", ["set_adapter", "disable_adapter_layers", "delete_adapter", "unload"])
def test_a_change_of_para_waits_too(change: str) -> None:
    model = para()
    model.add_adapter("two", ParaConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model, "two", seed=5)
    check_waits(model.eval(), CHANGES[change])


def test_a_change_from_inside_of_a_call_is_refused() -> None:
    model = fanlora()
    refused = []

    def change(*args: Any) -> None:
        for name in ("prune_modules", "score_modules", "merge_adapter", "delete_adapter"):
            with pytest.raises(RuntimeError, match="in the middle of a call"):
                CHANGES[name](model)
            refused.append(name)

    model.base_model.model.lm_head.register_forward_hook(change)
    model(**TINY["llama"].batch())
    assert len(refused) == 4


def test_stacks_made_while_a_change_waits_do_not_outlive_it() -> None:
    """Stacks were dropped before the gate closed: a call in between brought those of the old weights back."""
    model = fanlora()
    model.add_adapter("two", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model)
    names, batch = ["default", "two"], TINY["llama"].batch(rows=2)
    with torch.no_grad():
        model(**batch, adapter_names=names)
    assert model.base_model._batches._last
    with model.base_model.call_gate.closed(), torch.no_grad():
        model(**batch, adapter_names=names)  # a change may call the model itself
    assert not model.base_model._batches._last


def test_a_thread_is_alone_unless_another_one_is_in_a_call() -> None:
    gate = CallGate()

    def elsewhere() -> list[bool]:
        found: list[bool] = []
        thread = threading.Thread(target=lambda: found.append(is_alone(gate)))
        thread.start()
        thread.join()
        return found

    assert is_alone(gate)
    assert elsewhere() == [True]
    with gate.passed(), gate.passed():
        assert is_alone(gate)
        assert elsewhere() == [False]
    with gate.closed(), gate.passed():
        assert is_alone(gate)
    assert elsewhere() == [True]


def is_alone(gate: CallGate) -> bool:
    with gate.alone() as alone:
        return alone


def test_calls_begin_after_a_thread_was_alone() -> None:
    gate, events = CallGate(), []

    def call() -> None:
        with gate.passed():
            events.append("call")

    thread = threading.Thread(target=call)
    with gate.passed(), gate.alone():
        thread.start()
        thread.join(0.1)
        events.append("alone")
    thread.join()
    assert events == ["alone", "call"]


def test_after_a_change_the_calls_of_its_thread_count_again() -> None:
    gate, changed = CallGate(), threading.Event()

    def change() -> None:
        with gate.closed():
            changed.set()

    with gate.closed():
        pass
    with pytest.raises(KeyError), gate.closed():
        raise KeyError
    thread = threading.Thread(target=change)
    with gate.passed():
        thread.start()
        assert not changed.wait(0.1)
    thread.join()
    assert changed.is_set()
