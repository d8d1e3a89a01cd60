"""torch.compile computes what eager mode does, and a decoding step is one graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import _dynamo as dynamo
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, StaticCache

from integration_tests.helpers.models import (
    METHODS,
    adapted,
    config_of,
    generated,
    gradients,
    labelled,
    randomize,
    tiny,
    tokens,
)


both = pytest.mark.parametrize("method", METHODS)

CACHES: dict[str, Callable[[Any], Any]] = {
    "dynamic": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=32),
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    dynamo.reset()
    counters.clear()


def small(method: str, architecture: str = "llama") -> Any:
    """Returns an adapted model of one block: to compile more of them takes longer and shows no more."""
    depth = {"gpt2": "n_layer", "t5": "num_layers"}.get(architecture, "num_hidden_layers")
    task_type = "SEQ_2_SEQ_LM" if architecture == "t5" else "CAUSAL_LM"
    return adapted(method, base=tiny(architecture, **{depth: 1}), task_type=task_type)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def decode(model: Any, step: Any, cache: Any) -> torch.Tensor:
    """Returns the logits of four decoding steps after a prompt in eager mode."""
    last, steps = model(input_ids=tokens(), past_key_values=cache), []
    for _ in range(4):
        last = step(input_ids=last.logits[:, -1:].argmax(-1), past_key_values=cache)
        steps.append(last.logits)
    return torch.cat(steps, 1)


@pytest.mark.support("`torch.compile`: decoding without a graph break")
@pytest.mark.parametrize(("architecture", "cache"), [("gpt2", "dynamic"), ("llama", "static")])
@both
def test_a_decoding_step_is_one_graph(method: str, architecture: str, cache: str) -> None:
    model = small(method, architecture)
    expected = decode(model, model, CACHES[cache](model.config))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter)
    close(decode(model, compiled, CACHES[cache](model.config)), expected)
    assert not counters["graph_break"]
    # a growing cache has one graph for the first length and one for any length
    assert counter.frame_count == (2 if cache == "dynamic" else 1)


@pytest.mark.support("`torch.compile`: generation with a static cache")
@pytest.mark.parametrize("architecture", ["llama", "t5"])
@both
def test_generation_compiles(method: str, architecture: str) -> None:
    model = small(method, architecture)
    expected = generated(model)
    how = CompileConfig(backend="eager", fullgraph=True, mode=None)
    how._compile_all_devices = True  # transformers compiles on accelerators alone
    assert generated(model, cache_implementation="static", compile_config=how) == expected
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.support("`torch.compile`: several adapters in one batch")
@both
def test_mixed_batches_compile(method: str) -> None:
    model = small(method)
    model.add_adapter("second", config_of(method, r=3))
    randomize(model, "second", seed=7).eval()
    names = ["default", "second"]
    expected = generated(model, adapter_names=names)
    how = CompileConfig(backend="eager", fullgraph=False, mode=None)
    how._compile_all_devices = True
    found = generated(model, cache_implementation="static", compile_config=how, adapter_names=names)
    assert found == expected
    assert not counters["graph_break"]


@pytest.mark.support("`torch.compile`: training")
@pytest.mark.parametrize(("method", "checkpointing"), [("FanLoRA", False), ("PARA", False), ("PARA", True)])
def test_a_training_step_compiles(method: str, checkpointing: bool) -> None:
    model = small(method).train()
    batch = {"input_ids": tokens(2, 9), "labels": labelled(tokens(2, 9))}
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    expected = gradients(model, model(**batch).loss)
    compiled = torch.compile(model, backend="aot_eager")
    found = gradients(model, compiled(**batch).loss)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, atol=1e-5, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    if not checkpointing:  # where transformers itself breaks the graph
        breaks = list(counters["graph_break"])
        # PARA steps out of the graph to find the prompt and to store the vectors, and for nothing else.
        assert all("Calls._fill" in text or "CallHooks._keep" in text for text in breaks)
        assert bool(breaks) == (method == "PARA")


@torch.no_grad()
def test_a_compiled_step_on_a_reset_static_cache_raises() -> None:
    """Guards against vectors of an earlier prompt, which a compiled step does not look for."""
    model = small("PARA")
    cache = CACHES["static"](model.config)
    step = torch.compile(model, backend="aot_eager")
    decode(model, step, cache)
    cache.reset()
    with pytest.raises(RuntimeError, match="no longer holds the prompt"):
        step(input_ids=tokens()[:, :1], past_key_values=cache)
