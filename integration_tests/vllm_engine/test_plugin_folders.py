"""What the vLLM plugin reads of options and adapter folders, and what it refuses; needs no vLLM."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from integration_tests.helpers.models import para, tiny
from peft_fanlora import ParaConfig
from peft_fanlora.vllm_plugin.options import Options, read_options
from peft_fanlora.vllm_plugin.tenants import (
    CONFIG_NAME,
    WEIGHTS_NAME,
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


def set_config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / CONFIG_NAME
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def set_tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS_NAME)
        change(tensors)
        save_file(tensors, folder / WEIGHTS_NAME)

    return changed


def rename(old: str, new: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if old in key]:
            tensors[key.replace(old, new)] = tensors.pop(key)

    return set_tensors(change)


def drop(part: str) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[next(key for key in tensors if part in key)]

    return set_tensors(change)


def add(key: str) -> Callable[[Path], None]:
    return set_tensors(lambda tensors: tensors.__setitem__(key, torch.zeros(2)))


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])  # type: ignore[return-value]


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)  # type: ignore[return-value]


def remove_all(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


OWNER = "base_model.model.model.layers.0.self_attn.q_proj.para_generator."

BAD_FOLDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (remove_all, "does not exist"),
    "no configuration": (remove(CONFIG_NAME), f"no {CONFIG_NAME}"),
    "empty configuration": (replace(CONFIG_NAME, b""), "cannot be read"),
    "half a configuration": (cut(CONFIG_NAME, 30), "cannot be read"),
    "binary configuration": (replace(CONFIG_NAME, b"\xff\xfe\x00"), "cannot be read"),
    "a list": (replace(CONFIG_NAME, b"[1]"), "holds list"),
    "no method": (replace(CONFIG_NAME, b"{}"), "None"),
    "LoRA's method": (set_config(peft_type="LORA"), "'LORA'"),
    "FanLoRA's method": (set_config(peft_type="FANLORA"), "'FANLORA'"),
    "IA3": (set_config(peft_type="IA3"), "'IA3'"),
    "modules to save": (set_config(modules_to_save=["lm_head"]), "modules_to_save"),
    "trained tokens": (set_config(trainable_token_indices=[3]), "trainable_token_indices"),
    "trained tokens by layer": (set_config(trainable_token_indices={"embed_tokens": [3]}), "trainable_token_indices"),
    "rank 0": (set_config(r=0), "r=0"),
    "rank -1": (set_config(r=-1), "r=-1"),
    "rank as text": (set_config(r="4"), "r='4'"),
    "rank true": (set_config(r=True), "r=True"),
    "no rank": (set_config(r=None), "r=None"),
    "another rank": (set_config(r=5), "another base model"),
    "unknown pooling": (set_config(pooling="median"), "pooling='median'"),
    "no pooling": (set_config(pooling=None), "pooling=None"),
    "another pooling": (set_config(pooling="mean"), "unknown 'query'"),
    "unknown activation": (set_config(activation="swoosh"), "activation='swoosh'"),
    "no activation": (set_config(activation=None), "activation=None"),
    "another activation": (set_config(activation="rational"), "lacks 'activation"),
    "empty prompt end": (set_config(prompt_end_token_ids=[]), "prompt_end_token_ids"),
    "text as prompt end": (set_config(prompt_end_token_ids="###"), "prompt_end_token_ids"),
    "negative prompt end": (set_config(prompt_end_token_ids=[-1]), "prompt_end_token_ids"),
    "broken prompt end": (set_config(prompt_end_token_ids=[1, None]), "prompt_end_token_ids"),
    "no weights": (remove(WEIGHTS_NAME), f"no {WEIGHTS_NAME}"),
    "empty weights": (replace(WEIGHTS_NAME, b""), "damaged"),
    "half of the weights": (cut(WEIGHTS_NAME, 3000), "damaged"),
    "a head alone": (cut(WEIGHTS_NAME, 100), "damaged"),
    "text as weights": (replace(WEIGHTS_NAME, b"not weights at all, really"), "damaged"),
    "no tensors": (set_tensors(dict.clear), "no generator"),
    "a trained head": (add("base_model.model.lm_head.weight"), "lm_head"),
    "LoRA's tensors": (rename("para_generator.down", "lora_A.weight"), "no part of a PARA generator"),
    "no down-projection": (drop("down"), "lacks 'down'"),
    "no query": (drop("query"), "lacks 'query'"),
    "no up-projection left": (
        set_tensors(lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.0" in key and "up_" in key]),
        "without targets",
    ),
    "an unknown part": (add(OWNER + "gate"), "unknown 'gate'"),
    "an unknown target": (add(OWNER + "up_self_attn_x_proj"), "self_attn_x_proj"),
    "a target in another shape": (add(OWNER + "up_mlp_gate_proj"), "another base model"),
    "a block too many": (rename("layers.1", "layers.3"), "another base model"),
    "an expert": (rename("layers.0.self_attn.q_proj", "layers.0.mlp.experts.0.up_proj"), "experts"),
    "compressed attention": (rename("self_attn.q_proj", "self_attn.q_a_proj"), "compressed attention"),
    "another tree of modules": (rename("model.layers", "transformer.h"), "another base model"),
}


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
