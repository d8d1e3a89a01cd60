"""The stacked weights of a mixed batch: what they cost, and that they follow the adapters."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from peft.tuners.lora import LoraLayer
from peft.utils.hotswap import hotswap_adapter

from integration_tests.helpers.counting import Products
from integration_tests.helpers.models import TINY, fanlora, logits, randomize
from integration_tests.helpers.tenants import NAMES, check_rows, tenants
from peft_fanlora import FanLoraConfig
from peft_fanlora.fanlora.candidates import lora_factors
from peft_fanlora.fanlora.stacks import SharedAdapter, Slots
from peft_fanlora.serving.tenants import BASE_ROWS


@pytest.mark.parametrize(
    "names", [list("aabbcc"), list("aaaaaaabc"), list("abcabca"), [*"ab", BASE_ROWS], list("a"), list("abcdefgh")]
)
def test_slots_hold_each_row_once_with_bounded_padding(names: list[str]) -> None:
    adapters = sorted({name for name in names if name != BASE_ROWS})
    slots = Slots.of(names, adapters, torch.device("cpu"))
    padded = list(range(len(names))) if slots.padded is None else slots.padded.tolist()
    size = len(padded) // len(slots.adapters)
    assert [names[row] for row in padded] == [name for name in slots.adapters for _ in range(size)]
    rows = padded if slots.places is None else [padded[place] for place in slots.places.tolist()]
    assert sorted(rows) == [row for row, name in enumerate(names) if name != BASE_ROWS]
    assert slots.rows is None or rows == slots.rows.tolist()
    assert len(slots.adapters) < 2 * len(adapters)
    assert len(padded) < 2 * len(rows)


def test_a_layer_costs_two_products_however_many_tenants() -> None:
    model = fanlora()
    for tenant in range(7):
        model.add_adapter(f"t{tenant}", FanLoraConfig(r=2 + tenant, task_type="CAUSAL_LM"))
    randomize(model)
    model.requires_grad_(False)
    batch = TINY["llama"].batch(rows=8)
    for names in (["t0", "t1"] * 4, ["default", *(f"t{tenant}" for tenant in range(7))]):
        with torch.no_grad():
            model(**batch, adapter_names=names)  # stacks the adapters
            with Products() as mixed:
                model(**batch, adapter_names=names)
            with Products() as base, model.disable_adapter():
                model(**batch)
            model.requires_grad_(False)  # `disable_adapter` makes the active one trainable again
        own = mixed.counts - base.counts
        assert own["bmm"] + own["baddbmm_"] == 2 * TINY["llama"].num_modules
        assert own["copy_"] == own["mm"] == own["cat"] == 0


@pytest.mark.parametrize("names", [None, ["default"] * 3])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_one_adapter_for_all_rows_costs_two_products_on_its_own_weights(
    architecture: str, names: list[str] | None
) -> None:
    model = fanlora(architecture).eval()  # with weights that are trained
    randomize(model)
    batch = {**TINY[architecture].batch(), **({} if names is None else {"adapter_names": names})}
    with torch.no_grad(), Products() as own:
        model(**batch)
    with torch.no_grad(), Products() as base, model.disable_adapter():
        model(**batch)
    more = own.counts - base.counts
    assert {name: more[name] for name in ("mm", "addmm_", "add", "mul", "bmm", "copy_")} == {
        "mm": TINY[architecture].num_modules,
        "addmm_": TINY[architecture].num_modules,
        "add": 0,
        "mul": 0,
        "bmm": 0,
        "copy_": 0,
    }


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize(("dtype", "dtype_of_result"), [(FLOAT, FLOAT), (HALF, HALF), (FLOAT, HALF)])
def test_one_adapter_for_all_rows_in_any_precision(
    dtype: torch.dtype, dtype_of_result: torch.dtype, mode: Callable[[], Any]
) -> None:
    """Adapters are float32 where the base model is bfloat16."""
    layer = fanlora().base_model.model.model.layers[0].mlp.up_proj
    A, B = lora_factors(layer, "default")
    x, result = torch.randn(2, 3, A.shape[1], dtype=dtype), torch.randn(2, 3, B.shape[0], dtype=dtype_of_result)
    before = result.clone()
    with mode():
        found = SharedAdapter(layer, "default").add_to(result, x, None)
        expected = before + (layer.scaling["default"] * x.float() @ A.T @ B.T).to(dtype_of_result)
    torch.testing.assert_close(found, expected)
    if found.requires_grad:
        found.sum().backward()
        assert torch.equal(result, before)
        assert A.grad is not None and A.grad.abs().sum() > 0


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_rows_in_lower_precision_than_their_adapters(mode: Callable[[], Any]) -> None:
    model = tenants()
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.data = parameter.data.to(HALF)
    batch = {"input_ids": TINY["llama"].batch(rows=3)["input_ids"]}
    with mode():
        mixed = model(**batch, adapter_names=["two", "default", "two"]).logits
        for row, name in enumerate(["two", "default", "two"]):
            alone = model(input_ids=batch["input_ids"][row : row + 1], adapter_names=[name]).logits
            torch.testing.assert_close(mixed[row], alone[0], rtol=2e-2, atol=2e-2)
    assert mixed.dtype == HALF


def change_in_place(model: PeftModel, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B.two." in name:
                parameter.mul_(-2)


def change_trainable_behind_the_count(model: PeftModel, folder: Path) -> None:
    model.base_model.set_requires_grad("two")
    model(**TINY["llama"].batch(rows=2), adapter_names=["two", "default"])
    for name, parameter in model.named_parameters():
        if ".lora_B.two." in name:
            parameter.data.mul_(-2)


def replace_data(model: PeftModel, folder: Path) -> None:
    randomize(model, seed=7, std=0.2)


def load_over_the_name(model: PeftModel, folder: Path) -> None:
    model.save_pretrained(folder, selected_adapters=["default"])
    randomize(model, seed=7, std=0.2)
    model.load_adapter(folder, "default")


def load_with_new_tensors(model: PeftModel, folder: Path) -> None:
    content = {key: value * 2 for key, value in model.state_dict().items() if ".lora_A.two." in key}
    model.load_state_dict(content, strict=False, assign=True)


def delete_and_add_again(model: PeftModel, folder: Path) -> None:
    model.delete_adapter("two")
    model.add_adapter("two", FanLoraConfig(r=9, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    randomize(model, seed=5)


def change_precision(model: PeftModel, folder: Path) -> None:
    model.double()


def change_scale(model: PeftModel, folder: Path) -> None:
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 0.3)


def prune(model: PeftModel, folder: Path) -> None:
    scores = model.score_modules([TINY["llama"].batch()], method="weight_norm", adapter_name="default", progress=False)
    model.prune_modules(scores.select(keep=2), adapter_name="default")


def switch_on_dropout(model: PeftModel, folder: Path) -> None:
    """A layer whose dropout is switched on takes PEFT's path, which drops; switched off again it is as before."""
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    batch, names = TINY["llama"].batch(rows=2), ["three", "default"]
    before = logits(model, {**batch, "adapter_names": names})
    layer.lora_dropout["three"].train()
    assert not torch.equal(logits(model, {**batch, "adapter_names": names})[0], before[0])
    layer.lora_dropout["three"].eval()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_trainable_behind_the_count,
        replace_data,
        load_over_the_name,
        load_with_new_tensors,
        delete_and_add_again,
        change_precision,
        change_scale,
        prune,
        switch_on_dropout,
    ],
)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_stacks_follow_the_adapters(
    change: Callable[[PeftModel, Path], None], mode: Callable[[], Any], tmp_path: Path
) -> None:
    model = tenants()
    model.requires_grad_(False)
    with mode():
        model(**TINY["llama"].batch(rows=len(NAMES)), adapter_names=NAMES)
        model(**TINY["llama"].batch())
    change(model.eval(), tmp_path)
    model.eval()
    with mode():
        check_rows(model)


def test_stacks_follow_a_passing_change_of_scale() -> None:
    model = tenants()
    check_rows(model)
    with rescale_adapter_scale(model, 0.25):
        check_rows(model)
    check_rows(model)


def write_data(model: PeftModel, folder: Path) -> None:
    for name, parameter in model.named_parameters():
        if ".lora_B.two." in name:
            parameter.data.mul_(-1)


def write_while_trainable(model: PeftModel, folder: Path) -> None:
    model.base_model.set_requires_grad("two")
    write_data(model, folder)
    model.requires_grad_(False)


def hotswap(model: PeftModel, folder: Path, rank: int = 6) -> None:
    config = FanLoraConfig(r=rank, lora_alpha=9, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")
    other = randomize(get_peft_model(TINY["llama"].base(), config), seed=5)
    other.save_pretrained(str(folder))
    hotswap_adapter(model, str(folder), "two")


def hotswap_to_a_higher_rank(model: PeftModel, folder: Path) -> None:
    hotswap(model, folder, rank=9)


def load_state(model: PeftModel, folder: Path) -> None:
    state = get_peft_model_state_dict(model, adapter_name="two")
    state = {name: -tensor if ".lora_B." in name else tensor for name, tensor in state.items()}
    set_peft_model_state_dict(model, state, adapter_name="two")


def offload(model: PeftModel, folder: Path) -> None:
    layer = model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["two"]
    set_module_tensor_to_device(layer, "weight", "cpu", value=-layer.weight.data)


@pytest.mark.parametrize(
    "write", [write_data, write_while_trainable, hotswap, hotswap_to_a_higher_rank, load_state, offload]
)
def test_a_batch_begins_with_the_weights_of_its_adapters_however_they_were_written(
    write: Callable[[PeftModel, Path], None], tmp_path: Path
) -> None:
    """PEFT's hot-swap writes through `.data`, which PyTorch does not count: off by 6.7."""
    model = tenants()
    model.requires_grad_(False)
    names = ["two", "default", "two"]
    check_rows(model, names)
    before = logits(model, {**TINY["llama"].batch(rows=3), "adapter_names": names})
    write(model, tmp_path)
    check_rows(model, names)
    after = logits(model, {**TINY["llama"].batch(rows=3), "adapter_names": names})
    assert (after - before)[0].abs().max() > 0.01


def test_a_trainable_adapter_follows_each_step_of_any_optimizer() -> None:
    model = tenants()
    names = ["default", "two"]
    for _ in range(3):
        check_rows(model, names)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.data.add_(0.1)  # not counted by PyTorch
    check_rows(model, names)


def test_weights_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = tenants()
        check_rows(model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(2)
        check_rows(model)


def generation(model: PeftModel, tokens: int, names: list[str] | None) -> list[torch.Tensor]:
    """Returns the logits of a decoding loop that calls the model token by token."""
    ids, found, cache = TINY["llama"].batch(rows=2)["input_ids"], [], None
    for _ in range(tokens):
        with torch.no_grad():
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, adapter_names=names)
        found.append(output.logits[:, -1])
        ids, cache = ids[:, :1], output.past_key_values
    return found


@pytest.mark.parametrize("names", [["two", "default"], None])
def test_further_tokens_find_the_stacks_which_go_with_their_adapters(names: list[str] | None) -> None:
    """To stack eight tenants takes a third of a decoding step of the base model."""
    model = tenants()
    model.requires_grad_(False)
    made = []
    batches = model.base_model._batches
    make = batches._make
    batches._make = lambda *args: made.append(make(*args)) or made[-1]
    first = generation(model, 6, names)
    assert len(made) == 1
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.v_proj.lora_B["default"].weight.zero_()
    second = generation(model, 6, names)
    assert len(made) == 2
    assert not torch.equal(first[0], second[0])

    stack = weakref.ref(next(iter(made[-1].stacks.values())))
    weight = weakref.ref(model.base_model.model.model.layers[0].self_attn.v_proj.lora_A["two"].weight)
    made.clear()
    model.delete_adapter("two")
    gc.collect()
    assert stack() is None
    assert weight() is None


def test_a_deepcopy_and_a_pickle_have_stacks_of_their_own() -> None:
    model = tenants()
    check_rows(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        randomize(twin, seed=11)
        check_rows(twin)
    check_rows(model)
