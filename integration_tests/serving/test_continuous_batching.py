"""Continuous batching: each request gets what it gets alone, by every way into it, or an error before a token is drawn."""

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager, RequestState

from integration_tests.helpers.models import TINY, VOCAB, fanlora, para, randomize
from peft_fanlora import FanLoraConfig, ParaConfig
from peft_fanlora.serving.tenants import BASE_ROWS, load_tenant


PROMPTS = [[5, 17, 9], [33, 8, 41, 12, 60, 7, 22], [11], [50, 3, 29, 44, 18], [6, 6, 31, 9]]
SMALL = ContinuousBatchingConfig(max_batch_tokens=12, max_requests_per_batch=4, num_blocks=32, page_size=4)
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
BATCHED: dict[str, Any] = {"generation_config": GREEDY, "continuous_batching_config": SMALL}


MAKE: dict[str, Callable[[], PeftModel]] = {"FanLoRA": fanlora, "PARA": lambda: randomize(para(), std=0.6)}


def alone(model: nn.Module, prompt: list[int], **kwargs: Any) -> list[int]:
    """Returns the tokens that ordinary `generate` gives for a prompt."""
    ids = torch.tensor([prompt])
    kwargs = {"max_new_tokens": 6, "eos_token_id": VOCAB, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **kwargs)[0, len(prompt) :].tolist()


def tokens(results: dict[str, Any]) -> list[list[int]]:
    assert not any(result.error for result in results.values()), [result.error for result in results.values()]
    return [result.generated_tokens for result in results.values()]


def in_order(manager: ContinuousBatchingManager, requests: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while len(found) < len(requests):
        result = manager.get_result(timeout=60)
        assert result is not None
        found[result.request_id] = result
    return {request: found[request] for request in requests}


def by_context(model: Any) -> Any:
    with model.continuous_batching_context_manager(**BATCHED) as manager:
        return in_order(manager, manager.add_requests(PROMPTS))


def by_manager(model: Any) -> Any:
    manager = model.init_continuous_batching(**BATCHED)
    manager.start()
    requests = [manager.add_request(prompt) for prompt in PROMPTS]
    found = in_order(manager, requests)
    manager.stop()
    return found


WAYS: dict[str, Callable[[Any], Any]] = {
    "generate_batch": lambda model: model.generate_batch(PROMPTS, **BATCHED),
    "its tuner's": lambda model: model.base_model.generate_batch(PROMPTS, **BATCHED),
    "its base's": lambda model: model.get_base_model().generate_batch(PROMPTS, **BATCHED),
    "context": by_context,
    "manager": by_manager,
}


@pytest.mark.support("continuous batching")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_each_request_gets_the_tokens_that_it_gets_alone(method: str, way: str) -> None:
    """Guards against vectors that all the prompts of a step make together."""
    model = MAKE[method]()
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert tokens(WAYS[way](model)) == expected
    with model.disable_adapter():
        without = [alone(model, prompt) for prompt in PROMPTS]
        assert tokens(WAYS[way](model)) == without
    assert all(one != other for one, other in zip(expected, without, strict=True))


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_a_paged_cache_in_generate(method: str) -> None:
    model = MAKE[method]()
    prompts = torch.tensor([PROMPTS[0], PROMPTS[3][:3]])
    config = copy.deepcopy(GREEDY)
    config.continuous_batching_config = SMALL
    found = model.generate(prompts, cache_implementation="paged", generation_config=config)
    assert found[0, :, 3:].tolist() == [alone(model, prompt) for prompt in prompts.tolist()]


def tenants(method: str) -> PeftModel:
    model = MAKE[method]()
    make: Any = FanLoraConfig if method == "FanLoRA" else ParaConfig
    for index, name in enumerate(["two", "three"]):
        targets = ["q_proj", "up_proj"] if name == "two" else None
        model.add_adapter(name, make(r=2 + index, target_modules=targets, task_type="CAUSAL_LM"))
        randomize(model, name, seed=index + 7)
    return model.eval()


@pytest.mark.support("continuous batching, an adapter for each request")
@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_each_request_gets_its_own_adapter(method: str) -> None:
    model = tenants(method)
    names = ["two", "default", BASE_ROWS, "three", "two", "three", "two"]
    prompts = [*PROMPTS, PROMPTS[4], PROMPTS[1]]  # the same prompt by two adapters
    expected = [alone(model, prompt, adapter_names=[name]) for prompt, name in zip(prompts, names, strict=True)]
    assert tokens(model.generate_batch(prompts, adapter_names=names, **BATCHED)) == expected
    assert tokens(model.generate_batch(prompts, **BATCHED)) == [alone(model, prompt) for prompt in prompts]
    config = copy.deepcopy(GREEDY)
    config.continuous_batching_config = SMALL
    paged = model.generate(
        torch.tensor([PROMPTS[0]] * 2), cache_implementation="paged", generation_config=config, adapter_names=names[:2]
    )
    assert paged[0, :, 3:].tolist() == [alone(model, PROMPTS[0], adapter_names=[name]) for name in names[:2]]


def test_a_manager_made_by_hand_draws_no_token_with_para() -> None:
    model = para()
    manager = ContinuousBatchingManager(model.get_base_model(), GREEDY, SMALL)
    manager.start()
    request = manager.add_request(PROMPTS[0])
    result = manager.get_result(request, timeout=60)
    manager.stop()
    assert "use `generate`" in result.error and not result.generated_tokens
    assert len(alone(model, PROMPTS[0])) == 6


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_unloading_removes_the_entries(method: str) -> None:
    model = MAKE[method]()
    entries = {"generate_batch", "init_continuous_batching"}
    own = vars(model.get_base_model())
    assert entries <= own.keys()
    model.unload()
    assert not entries & own.keys()


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_the_token_probabilities_are_those_of_one_teacher_forced_pass(method: str) -> None:
    """Guards against vectors or deltas that are a little wrong, which greedy tokens may hide."""
    model = tenants(method)
    names = ["default", "two", "three", BASE_ROWS, "two"]
    config = copy.deepcopy(SMALL)
    config.return_logprobs = True
    results = model.generate_batch(
        PROMPTS, adapter_names=names, generation_config=GREEDY, continuous_batching_config=config
    )
    for prompt, name, result in zip(PROMPTS, names, results.values(), strict=True):
        ids = torch.tensor([prompt + result.generated_tokens])
        masked = {"prompt_mask": torch.arange(ids.shape[1])[None] < len(prompt)} if method == "PARA" else {}
        with torch.no_grad():
            chances = model(ids, adapter_names=[name], **masked).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = chances.gather(1, torch.tensor(result.generated_tokens)[:, None]).squeeze(1)
        torch.testing.assert_close(torch.tensor(result.logprobs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_requests_that_a_full_cache_evicts_keep_their_vectors(method: str) -> None:
    """Guards against vectors made again from a prompt and the answer so far."""
    model = tenants(method)
    config = ContinuousBatchingConfig(max_batch_tokens=24, num_blocks=8, page_size=4)
    names = ["default", "two", "three", "two", "default"]
    put_back: list[str] = []
    original = RequestState.create_equivalent_initial_request

    def watched(state: RequestState) -> RequestState:
        put_back.append(state.request_id)
        return original(state)

    generation = copy.deepcopy(GREEDY)
    generation.max_new_tokens = 14
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestState, "create_equivalent_initial_request", watched)
        found = model.generate_batch(
            PROMPTS, adapter_names=names, generation_config=generation, continuous_batching_config=config
        )
    assert put_back
    assert tokens(found) == [
        alone(model, prompt, adapter_names=[name], max_new_tokens=14)
        for prompt, name in zip(PROMPTS, names, strict=True)
    ]


def test_a_prompt_longer_than_a_step() -> None:
    """FanLoRA may split a prompt; PARA, which reads it as a whole, says what to raise."""
    prompts = [PROMPTS[0], list(range(3, 23))]
    model = tenants("FanLoRA")
    names = ["two", "three"]
    expected = [alone(model, prompt, adapter_names=[name]) for prompt, name in zip(prompts, names, strict=True)]
    assert tokens(model.generate_batch(prompts, adapter_names=names, **BATCHED)) == expected
    model = tenants("PARA")
    with pytest.raises(ValueError, match=r"20 tokens.*max_batch_tokens"):
        model.generate_batch(prompts, **BATCHED)
    larger = ContinuousBatchingConfig(max_batch_tokens=20, num_blocks=32, page_size=4)
    found = model.generate_batch(prompts, generation_config=GREEDY, continuous_batching_config=larger)
    assert tokens(found) == [alone(model, prompt) for prompt in prompts]


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_several_answers_to_a_prompt(method: str) -> None:
    """Guards against a prompt that is split before its last token, to continue in several ways."""
    model = tenants(method)
    generation = copy.deepcopy(GREEDY)
    generation.num_return_sequences, generation.do_sample, generation.top_k = 2, True, 1
    names = ["default", "two", "three", "two", "default"]
    options = {"generation_config": generation, "continuous_batching_config": SMALL}
    expected = [alone(model, prompt) for prompt in PROMPTS for _ in range(2)]
    assert tokens(model.generate_batch(PROMPTS, **options)) == expected
    expected = [
        alone(model, prompt, adapter_names=[name])
        for prompt, name in zip(PROMPTS, names, strict=True)
        for _ in range(2)
    ]
    assert tokens(model.generate_batch(PROMPTS, adapter_names=names, **options)) == expected


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_a_manager_that_is_kept_reads_nothing_that_other_weights_made(method: str) -> None:
    """Guards against cached prefixes, and vectors of a request of the same id, after a change of adapters or weights."""
    model = tenants(method)
    prompts = [list(range(3, 14)), list(range(3, 15))]  # a common prefix of two blocks
    for change in (
        lambda: None,
        lambda: randomize(model, "default", seed=5),
        lambda: model.set_adapter("two"),
        lambda: model.set_adapter("default"),
    ):
        change()
        expected = [alone(model, prompt) for prompt in prompts]
        for _ in range(2):
            assert tokens(model.generate_batch(prompts, persistent_manager=True, **BATCHED)) == expected
        named = model.generate_batch(prompts, adapter_names=["three", "two"], persistent_manager=True, **BATCHED)
        assert tokens(named) == [
            alone(model, prompt, adapter_names=[name]) for prompt, name in zip(prompts, ["three", "two"], strict=True)
        ]
    model.destroy_cached_continuous_batching_manager()


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_adapters_that_are_switched_while_requests_wait_are_an_error(method: str) -> None:
    model = tenants(method)
    with model.continuous_batching_context_manager(**BATCHED) as manager:
        assert in_order(manager, [manager.add_request(PROMPTS[0])])
        model.set_adapter("two")
        request = manager.add_request(PROMPTS[0])
        assert "before switching adapters" in in_order(manager, [request])[request].error


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_names_that_cannot_be_served_are_refused_before_the_thread_starts(method: str) -> None:
    model = tenants(method)
    with pytest.raises(ValueError, match="2 names, but there are 5 prompts"):
        model.generate_batch(PROMPTS, adapter_names=["two", "three"], **BATCHED)
    with pytest.raises(ValueError, match=r"non-existing adapter.*four"):
        model.generate_batch(PROMPTS, adapter_names=["four"] * 5, **BATCHED)
    with model._enable_peft_forward_hooks(adapter_names=["two"]), pytest.raises(ValueError, match="adapter_names="):
        model.init_continuous_batching(**BATCHED)
    make: Any = FanLoraConfig if method == "FanLoRA" else ParaConfig
    whole = get_peft_model(TINY["llama"].base(), make(r=2, task_type="CAUSAL_LM", modules_to_save=["lm_head"])).eval()
    assert tokens(whole.generate_batch(PROMPTS, **BATCHED)) == [alone(whole, prompt) for prompt in PROMPTS]
    with pytest.raises(ValueError, match="modules_to_save"):
        whole.generate_batch(PROMPTS, adapter_names=["default"] * 5, **BATCHED)
    head = get_peft_model(
        TINY["llama"].base(), make(r=2, task_type="CAUSAL_LM", target_modules=["v_proj", "lm_head"])
    ).eval()
    with pytest.raises(ValueError, match="head"):
        head.generate_batch(PROMPTS, adapter_names=["default"] * 5, **BATCHED)
    assert not [thread for thread in threading.enumerate() if "_run_generation_loop" in thread.name]


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_a_copy_batches_with_its_own_adapters(method: str) -> None:
    model = tenants(method)
    twin = copy.deepcopy(model)
    randomize(twin, "two", seed=3)
    names = ["two"] * len(PROMPTS)
    for one in (model, twin, pickle.loads(pickle.dumps(twin))):
        expected = [alone(one, prompt, adapter_names=["two"]) for prompt in PROMPTS]
        assert tokens(one.generate_batch(PROMPTS, adapter_names=names, **BATCHED)) == expected


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_tenants_come_and_go_between_the_steps(method: str, tmp_path: Path) -> None:
    model = tenants(method)
    model.save_pretrained(tmp_path)
    expected = alone(model, PROMPTS[0])
    with model.continuous_batching_context_manager(**BATCHED) as manager:
        requests = [manager.add_request(PROMPTS[0]) for _ in range(20)]
        for index in range(3):
            load_tenant(model, tmp_path, f"tenant {index}")
        found = in_order(manager, requests)
    assert tokens(found) == [expected] * 20


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_masks_that_continuous_batching_ignores_are_refused(method: str) -> None:
    model = tenants(method)
    prompts = torch.tensor([[0, *PROMPTS[0]], PROMPTS[4]])
    with pytest.raises(ValueError, match="ignores the attention_mask"):
        model.generate(prompts, attention_mask=prompts != 0, cache_implementation="paged", generation_config=GREEDY)
    if method == "PARA":
        with pytest.raises(ValueError, match="prompt_end_token_ids"):
            model.generate(prompts, prompt_mask=prompts < 9, cache_implementation="paged", generation_config=GREEDY)
        with pytest.raises(ValueError, match="prompt_end_token_ids"):
            model.generate_batch(PROMPTS, prompt_mask=prompts < 9, **BATCHED)
    assert alone(model, PROMPTS[0]) == tokens(model.generate_batch(PROMPTS[:1], **BATCHED))[0]


def test_models_and_adapters_that_cannot_keep_requests_apart_are_refused() -> None:
    """Guards against attention that ignores the paged cache, and LoRA that looks for its tokens in `generate`."""
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2))
    for config in (FanLoraConfig(r=2, task_type="CAUSAL_LM"), ParaConfig(r=2, task_type="CAUSAL_LM")):
        with pytest.raises(ValueError, match="BloomForCausalLM does not read a paged cache"):
            get_peft_model(copy.deepcopy(bloom), config).generate_batch(PROMPTS, **BATCHED)
    activated = FanLoraConfig(r=2, task_type="CAUSAL_LM", alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="Activated LoRA"):
        get_peft_model(TINY["llama"].base(), activated).eval().generate_batch(PROMPTS, **BATCHED)


def test_several_active_para_adapters_multiply() -> None:
    model = tenants("PARA")
    model.base_model.set_adapter(["default", "two"])
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert tokens(model.generate_batch(PROMPTS, **BATCHED)) == expected
    model.base_model.set_adapter(["default"])
    assert tokens(model.generate_batch(PROMPTS, **BATCHED)) != expected


def test_the_prompt_ends_where_the_config_says() -> None:
    model = get_peft_model(
        TINY["llama"].base(), ParaConfig(r=4, task_type="CAUSAL_LM", prompt_end_token_ids=[41])
    ).eval()
    randomize(model, "default", seed=1)
    expected = [alone(model, prompt) for prompt in PROMPTS]
    assert tokens(model.generate_batch(PROMPTS, **BATCHED)) == expected
    without = para()
    without.load_state_dict(model.state_dict())
    assert alone(without, PROMPTS[1]) != expected[1]


@pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
def test_a_tenant_that_comes_during_a_paged_generate_blocks_nothing(method: str, tmp_path: Path) -> None:
    """Guards against a change that waits for the call, whose steps wait for the change."""
    model = tenants(method)
    model.save_pretrained(tmp_path)
    config = copy.deepcopy(GREEDY)
    config.continuous_batching_config, config.max_new_tokens = SMALL, 40
    running, found = threading.Event(), []

    def generate() -> None:
        found.append(
            model.generate(torch.tensor([PROMPTS[0]]), cache_implementation="paged", generation_config=config)
        )

    with pytest.MonkeyPatch.context() as patch:
        step = ContinuousBatchingManager._generation_step
        patch.setattr(ContinuousBatchingManager, "_generation_step", lambda own: (running.set(), step(own))[1])
        call = threading.Thread(target=generate, daemon=True)
        call.start()
        running.wait(60)
        change = threading.Thread(target=load_tenant, args=(model, tmp_path, "late"), daemon=True)
        change.start()
        change.join(60)
        call.join(60)
    assert not (call.is_alive() or change.is_alive())
    assert found[0][0, 0, 3:].tolist() == alone(model, PROMPTS[0], max_new_tokens=40)
