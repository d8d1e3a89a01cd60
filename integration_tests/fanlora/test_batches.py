"""Many FanLoRA tenants in one batch: each row is what its adapter alone gives, whatever happens to the adapters."""

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from integration_tests.helpers.counting import num_hooks
from integration_tests.helpers.models import TINY, logits, randomize
from integration_tests.helpers.tenants import NAMES, alone, check_rows, tenants
from peft_fanlora import FanLoraConfig
from peft_fanlora.serving.tenants import BASE_ROWS


@pytest.mark.support("mixed batches (`adapter_names`)")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("architecture", TINY)
def test_each_row_is_what_its_adapter_alone_gives(method: str, architecture: str) -> None:
    model = tenants(architecture)
    check_rows(model)
    check_rows(model, ["default", "two", "three"])
    check_rows(model, ["three"] * 2 + ["two"] * 2)
    check_rows(model, [BASE_ROWS] * 2)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradients_are_those_of_the_rows_alone(architecture: str) -> None:
    model = tenants(architecture)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name
    batch = TINY[architecture].batch(rows=4)
    del batch["labels"]
    names = ["two", "default", BASE_ROWS, "two"]
    for row, name in enumerate(names):
        if name != BASE_ROWS:
            model.base_model.set_adapter(name)
            model(
                {key: value[row : row + 1] for key, value in batch.items()}["input_ids"]
            ).logits.square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    model.base_model.set_requires_grad(["default", "two"])
    for _ in range(2):  # a second step has a graph of its own
        logits(model, {**batch, "adapter_names": names})
        model.zero_grad()
        model(batch["input_ids"], adapter_names=names).logits.square().sum().backward()
        assert not model.base_model._batches._last  # which would keep the graph alive
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(expected) > 20
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert not any(gradient.abs().sum() for name, gradient in found.items() if ".three." in name)


def activate_two(model: PeftModel) -> None:
    model.base_model.set_adapter(["default", "two"])


def activate_another_in_one_layer(model: PeftModel) -> None:
    model.base_model.model.model.layers[0].self_attn.v_proj.set_adapter("two")


def merge(model: PeftModel) -> None:
    model.merge_adapter()


def hook_a_factor(model: PeftModel) -> None:
    factor = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["default"]
    factor.register_forward_hook(lambda module, args, output: 3 * output)


class Bounded(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def replace_a_factor(model: PeftModel) -> None:
    factors = model.base_model.model.model.layers[1].mlp.down_proj.lora_A
    factors["default"] = Bounded(24, 4, bias=False)


def make_the_active_one_dora(model: PeftModel) -> None:
    dora = FanLoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model.add_adapter("dora", dora)
    model.set_adapter("dora")
    randomize(model)


@pytest.mark.parametrize(
    "change",
    [
        activate_two,
        activate_another_in_one_layer,
        merge,
        hook_a_factor,
        replace_a_factor,
        make_the_active_one_dora,
    ],
)
def test_inference_without_names_computes_what_peft_does(change: Callable[[PeftModel], None]) -> None:
    model = tenants()
    batch = TINY["llama"].batch()
    with torch.no_grad():
        before = model(**batch).logits
        change(model.eval())
        found = model(**batch).logits
    expected = model(**batch).logits
    assert change is merge or not torch.allclose(found, before)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_hook_on_the_base_layer_keeps_the_base_layer_s_output() -> None:
    model = tenants()
    base, seen = model.base_model.model.model.layers[1].mlp.down_proj.base_layer, []
    handle = base.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    for options in ({}, {"adapter_names": ["two", "default"]}):
        logits(model, {**TINY["llama"].batch(rows=2), **options})
    handle.remove()
    for x, output in seen:
        torch.testing.assert_close(output, base(x))


def generate(model: PeftModel, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    mask = (ids != 0).long()
    with torch.no_grad():
        return model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=5, min_new_tokens=5, **kwargs
        )


@pytest.mark.support("mixed batches in `generate`, with beams")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_generation_gives_each_row_its_own_continuation(
    method: str, architecture: str, options: dict[str, int]
) -> None:
    model = tenants(architecture)
    ids = TINY[architecture].batch(rows=3)["input_ids"]
    ids[1, :2] = 0  # padded on the left
    names = ["two", BASE_ROWS, "default"]
    mixed = generate(model, ids, adapter_names=names, **options)
    each = options.get("num_return_sequences", 1)
    for row, name in enumerate(names):
        model.set_adapter("default" if name == BASE_ROWS else name)
        if name == BASE_ROWS:
            with model.disable_adapter():
                expected = generate(model, ids[row : row + 1], **options)
        else:
            expected = generate(model, ids[row : row + 1], **options)
        assert torch.equal(mixed[row * each : (row + 1) * each], expected)


def test_beams_of_the_generation_config_count_too() -> None:
    model = tenants()
    ids = TINY["llama"].batch(rows=2)["input_ids"]
    config = copy.deepcopy(model.generation_config)
    expected = generate(model, ids, adapter_names=["two", "default"], num_beams=2)
    config.num_beams = 2
    assert torch.equal(generate(model, ids, adapter_names=["two", "default"], generation_config=config), expected)


def test_two_threads_each_get_their_own_result() -> None:
    model = tenants()
    ids = TINY["llama"].batch(rows=3)["input_ids"]
    batches = [["default", "two", "three"], ["three", "three", BASE_ROWS], ["two", "default", "default"], None]
    call = [{} if names is None else {"adapter_names": names} for names in batches]
    expected = [generate(model, ids, **options) for options in call]
    assert len({tuple(result.flatten().tolist()) for result in expected}) == 4
    wrong: list[Any] = []
    start = threading.Barrier(len(call))

    def serve(index: int) -> None:
        try:
            start.wait()
            for _ in range(4):
                assert torch.equal(generate(model, ids, **call[index]), expected[index]), batches[index]
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(index,)) for index in range(len(call))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_within_a_call_uses_its_own_names() -> None:
    model = tenants()
    batch = TINY["llama"].batch(rows=2)
    inner = []

    def another_call(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner[0] = logits(model, {**batch, "adapter_names": ["three", "default"]})

    expected = logits(model, {**batch, "adapter_names": ["two", BASE_ROWS]})
    expected_inner = logits(model, {**batch, "adapter_names": ["three", "default"]})
    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(another_call)
    torch.testing.assert_close(logits(model, {**batch, "adapter_names": ["two", BASE_ROWS]}), expected)
    handle.remove()
    torch.testing.assert_close(inner[0], expected_inner)


def test_a_call_repeats_no_rows_though_generate_would() -> None:
    """With beams in its generation config, a model took four rows for the beams of one in plain calls too."""
    model = tenants()
    model.base_model.model.generation_config.num_beams = 4
    with torch.no_grad(), pytest.raises(ValueError, match="but got 2 and 8 respectively"):
        model(**TINY["llama"].batch(rows=8), adapter_names=["default", "two"])


def test_what_fails_leaves_no_hook_and_says_why() -> None:
    model = tenants()
    batch = TINY["llama"].batch(rows=2)
    hooks = []
    for _ in range(3):
        check_rows(model)
        hooks.append(num_hooks(model))
    assert hooks == hooks[:1] * 3
    for names, message in [
        (["thrid", "default"], r"non-existing adapter\(s\): thrid. The adapters are .*'two'.*__base__"),
        (["default"] * 3, "but got 3 and 2 respectively"),
        (["default"], "but got 1 and 2 respectively"),
        ("default", "pass a list with one adapter name per row"),
        ([1, 2], "pass a list with one adapter name per row"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(**batch, adapter_names=names)
        with pytest.raises(ValueError, match=message):
            model.generate(input_ids=batch["input_ids"], adapter_names=names)
    with pytest.raises(IndexError):
        model(input_ids=batch["input_ids"] + 1000, adapter_names=["default", "two"])
    with pytest.raises(ValueError, match=r"Call model.eval\(\) first"):
        model.train()(**batch, adapter_names=["default", "two"])
    assert num_hooks(model) == hooks[0]
    model.eval()
    check_rows(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(**batch, adapter_names=["default", "two"])
    model.unmerge_adapter()
    check_rows(model, tolerance=1e-4)


def test_unloading_leaves_nothing_behind() -> None:
    model = tenants()
    check_rows(model)
    twin = copy.deepcopy(model)
    check_rows(twin)
    assert num_hooks(twin) == num_hooks(model) > 0
    assert num_hooks(twin.unload()) == num_hooks(model.merge_and_unload()) == 0


def replicated(model: nn.Module) -> Any:
    """Makes a replica as `DataParallel` does, but on the same device."""
    replicas: dict[nn.Module, Any] = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        replica._modules.update({key: replicas[child] for key, child in module._modules.items() if child is not None})
        for key, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[key] = None
            else:
                setattr(replica, key, parameter.view_as(parameter))
    return replicas[model]


def test_data_parallel_runs_its_replicas_and_not_the_original() -> None:
    model = tenants()
    batch = TINY["llama"].batch()
    expected = logits(model, batch)  # puts something before the layers' own forward
    check_rows(model)
    replica = replicated(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # whose memory this replica shares
            parameter.mul_(2 if "lora_B" in name else 1)
    for name, module in replica.named_modules():
        assert "forward" not in vars(module), name
    seen = []
    layer = replica.base_model.model.model.layers[0].mlp.down_proj
    layer.base_layer.register_forward_hook(lambda *call: seen.append(None))
    found = [replica(**batch).logits]
    with torch.no_grad():
        found.append(replica(**batch).logits)
    assert len(seen) == 2
    for one in found:
        assert not torch.allclose(one, expected)
        torch.testing.assert_close(one, logits(model, batch))


@pytest.mark.parametrize("first", ["accelerate", "mixed batch"])
def test_a_layer_whose_forward_accelerate_has_replaced_mixes_too(first: str) -> None:
    model = tenants()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    if first == "mixed batch":
        check_rows(model)
    add_hook_to_module(layer, ModelHook())
    check_rows(model)
    remove_hook_from_module(layer)
    check_rows(model)


def test_names_have_no_effect_while_adapters_are_disabled() -> None:
    model = tenants()
    batch = TINY["llama"].batch(rows=2)
    with model.disable_adapter():
        expected = logits(model, batch)
        assert torch.equal(logits(model, {**batch, "adapter_names": ["default", "two"]}), expected)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model, {**batch, "adapter_names": ["default", "two"]}), expected)


@pytest.mark.parametrize(
    "extra",
    [
        {"lora_bias": True, "target_modules": ["q_proj", "v_proj"]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "v_proj"]},
        {"trainable_token_indices": [5, 6]},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_is_not_plain_lora_takes_peft_s_path(extra: dict[str, Any]) -> None:
    architecture = "qwen2" if "lora_bias" in extra else "llama"
    model = tenants(architecture)
    model.add_adapter("four", FanLoraConfig(r=3, task_type="CAUSAL_LM", **extra))
    randomize(model, std=0.3)
    for name, parameter in model.named_parameters():
        if (".four" in name and "lora_" not in name) or ".lora_B.four.bias" in name:
            nn.init.normal_(parameter)
    check_rows(model.eval(), [*NAMES, "four"])
    names = ["four", "two"]
    ids = TINY[architecture].batch(rows=2)["input_ids"]
    mixed = generate(model, ids, adapter_names=names, num_beams=2)
    for row, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(mixed[row : row + 1], generate(model, ids[row : row + 1], num_beams=2))


def test_dora_is_refused_as_in_peft() -> None:
    model = tenants()
    model.add_adapter("dora", FanLoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="DoRA"):
        check_rows(model.eval(), ["dora", "two"])
    check_rows(model)


def test_hooks_on_the_factors_see_what_passes() -> None:
    model = tenants()
    model.requires_grad_(False)
    batch = TINY["llama"].batch(rows=3)
    names = ["two", "default", "two"]
    expected, seen = logits(model, {**batch, "adapter_names": names}), []
    factor = model.base_model.model.model.layers[1].mlp.down_proj.lora_B["two"]
    factor.register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(logits(model, {**batch, "adapter_names": names}), expected)
    assert [len(output) for output in seen] == [2]


def test_a_hook_of_the_user_sees_the_finished_output() -> None:
    model = tenants()
    batch = TINY["llama"].batch(rows=2)
    layer, seen = model.base_model.model.model.layers[1].mlp.down_proj, []
    layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    logits(model, {**batch, "adapter_names": ["two", "two"]})
    model.set_adapter("two")
    logits(model, batch)
    torch.testing.assert_close(seen[0], seen[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters_in_float32", [True, False])
def test_half_precision(dtype: torch.dtype, adapters_in_float32: bool) -> None:
    model = tenants(base=TINY["llama"].base().to(dtype))
    if not adapters_in_float32:
        model.to(dtype)
    check_rows(model, tolerance=0.05)
    batch = TINY["llama"].batch(rows=2)
    assert logits(model, {**batch, "adapter_names": ["two", "default"]}).dtype == dtype


@pytest.mark.parametrize("grad", [False, True])
def test_autocast(grad: bool) -> None:
    model = tenants()
    batch = TINY["llama"].batch(rows=len(NAMES))
    with torch.set_grad_enabled(grad), torch.autocast("cpu", torch.bfloat16):
        mixed = model(**batch, adapter_names=NAMES).logits
        for row, name in enumerate(NAMES):
            expected = alone(model, batch, row, name)
            assert (mixed[row] - expected).abs().max() < 0.1 * expected.abs().max()  # both are off by 2% of their norm


@pytest.mark.support("mixed batches on a quantised base")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_bases(method: str, bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    TINY["llama"].base(hidden_size=64, intermediate_size=64).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    base = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, dtype=torch.float32)
    model = tenants(base=base)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    assert type(layer).__name__ in ("Linear4bit", "Linear8bitLt")
    check_rows(model, ["two", "default", BASE_ROWS, "default"], tolerance=0.05)  # rounding to 8 bits is a step


def test_plain_lora_of_peft_gives_the_same() -> None:
    """An adapter of PEFT's own type in a mixed batch, as the reference for ours."""
    fanlora = tenants()
    plain = get_peft_model(TINY["llama"].base(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    configs = fanlora.peft_config
    for name in ("two", "three"):
        config = configs[name]
        plain.add_adapter(
            name,
            LoraConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                target_modules=config.target_modules,
                rank_pattern=config.rank_pattern,
                use_rslora=config.use_rslora,
            ),
        )
    plain.load_state_dict(fanlora.state_dict())
    batch = TINY["llama"].batch(rows=len(NAMES))
    torch.testing.assert_close(
        logits(fanlora, {**batch, "adapter_names": NAMES}), logits(plain.eval(), {**batch, "adapter_names": NAMES})
    )
