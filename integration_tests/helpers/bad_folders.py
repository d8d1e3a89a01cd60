"""Changes to a PARA adapter's folder that make it invalid, and a pattern of the error message for each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from peft_fanlora.vllm_plugin.tenants import CONFIG_NAME, WEIGHTS_NAME


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
    "a deeply nested configuration": (replace(CONFIG_NAME, b"[" * 100_000), "cannot be read"),
    "a key twice": (replace(CONFIG_NAME, b'{"peft_type": "PARA", "peft_type": "LORA"}'), "cannot be read"),
    "binary configuration": (replace(CONFIG_NAME, b"\xff\xfe\x00"), "cannot be read"),
    "a list": (replace(CONFIG_NAME, b"[1]"), "contains a list"),
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
    "LoRA's tensors": (rename("para_generator.down", "lora_A.weight"), "not a parameter of a PARA generator"),
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
