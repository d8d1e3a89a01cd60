"""How the vLLM plugin reads and checks options and adapter folders; does not need vLLM."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from integration_tests.helpers.bad_folders import BAD_FOLDERS
from integration_tests.helpers.models import para, tiny
from peft_fanlora import ParaConfig
from peft_fanlora.vllm_plugin.options import Options, read_options
from peft_fanlora.vllm_plugin.tenants import (
    TenantError,
    check_blocks,
    linear_shapes,
    peft_type_of,
    prompt_length,
    read_blocks,
    read_config,
)


def test_an_engine_without_the_key_serves_no_para() -> None:
    assert read_options({}) is None
    assert read_options({"other": {}}) is None
    assert read_options(None) is None
    assert read_options({"para": {}}) == Options(lora=False)
    assert read_options({"para": {"lora": True}}) == Options(lora=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [(True, "not a dict"), ([], "not a dict"), ({"loras": True}, "no option 'loras'"), ({"lora": 1}, "true or false")],
)
def test_wrong_options_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_options({"para": given})


@pytest.mark.parametrize(
    ("tokens", "end", "length"),
    [
        ([1, 2, 3], None, 3),
        ([1, 7, 8, 3], (7, 8), 3),
        ([7, 8, 7, 8], (7, 8), 2),
        ([7, 1, 8], (7, 8), 3),
        ([1, 2, 7, 8], (7, 8), 4),
        ([7], (7, 8), 1),
        ([5], (5,), 1),
    ],
)
def test_the_prompt_reaches_to_the_first_match(tokens: list[int], end: tuple[int, ...] | None, length: int) -> None:
    assert prompt_length(tokens, end) == length


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "mean, rational": ("llama", {"pooling": "mean", "activation": "rational"}),
    "one block": ("llama", {"target_modules": ["v_proj"], "layers_to_transform": [1]}),
    "fused projections": ("phi3", {}),
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "prompt end": ("qwen2", {"prompt_end_token_ids": [3, 4]}),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    para().save_pretrained(tmp_path / "tenant")
    return tmp_path / "tenant"


def check(folder: Path, architecture: str = "llama", **overrides: Any) -> list[dict[str, str]]:
    base = tiny(architecture, **overrides)
    config = read_config(folder)
    return check_blocks(read_blocks(folder, shapes_only=True), config, linear_shapes(base), base.config, folder)


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_adapters_fit_their_model(name: str, tmp_path: Path) -> None:
    architecture, config = VARIANTS[name]
    model = para(architecture, **config)
    model.save_pretrained(tmp_path)
    found = check(tmp_path, architecture)
    assert {module for block in found for module in block.values()} == set(model.targeted_module_names)
    assert read_config(tmp_path).prompt_end == (tuple(config.get("prompt_end_token_ids", ())) or None)


def test_the_shapes_are_those_of_the_tensors(folder: Path) -> None:
    for shapes, tensors in zip(read_blocks(folder, shapes_only=True), read_blocks(folder), strict=True):
        assert shapes.parts == {name: tuple(part.shape) for name, part in tensors.parts.items()}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_refused(name: str, folder: Path) -> None:
    change, message = BAD_FOLDERS[name]
    change(folder)
    with pytest.raises(TenantError, match=message):
        check(folder)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 32},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 1},
        {"intermediate_size": 64},
        {"num_hidden_layers": 2},
    ],
    ids=str,
)
def test_another_base_model_is_noticed(overrides: dict[str, int], folder: Path) -> None:
    with pytest.raises(TenantError, match="another base model"):
        check(folder, **overrides)


def test_projections_that_engines_hold_in_another_order_are_refused(tmp_path: Path) -> None:
    para("gpt_neox").save_pretrained(tmp_path)
    with pytest.raises(TenantError, match="another order"):
        check(tmp_path, "gpt_neox")


def test_the_method_of_a_folder(folder: Path, tmp_path: Path) -> None:
    get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "lora")
    assert peft_type_of(folder) == "PARA"
    assert peft_type_of(tmp_path / "lora") == "LORA"
    assert ParaConfig.from_pretrained(folder).peft_type == peft_type_of(folder)
