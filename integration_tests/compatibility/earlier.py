"""Writes what this version saves into a folder of its name, for the tests of the versions after it.

`python integration_tests/compatibility/earlier.py` is run once for each release. The base models are made from formulas,
so that they are the same with every version of torch and transformers.
"""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from peft_fanlora import FanLoraConfig, FanLoraSetting, ModuleCosts, ParaConfig, export_lora
from peft_fanlora.version import __version__


EARLIER = Path(__file__).parent / "earlier"
PARA: dict[str, dict[str, Any]] = {
    "attention": {},
    "mean": {"activation": "rational"},
    "max": {"activation": "silu", "layers_to_transform": [1]},
    "last": {"prompt_end_token_ids": [5, 6]},
}
"""The poolings, each with another option."""


def formula(module: nn.Module, scale: float) -> nn.Module:
    """Gives all matrices of a module weights that are functions of their names."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            angles = torch.arange(parameter.numel(), dtype=torch.float64) * 0.7 + zlib.crc32(name.encode()) % 1000
            parameter.data = (scale * angles.sin()).view_as(parameter).to(parameter)
    return module


def base(kind: str) -> nn.Module:
    """Returns the base model of a kind of adapter."""
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_labels": 3}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, max_position_embeddings=32)
    return formula((LlamaForSequenceClassification if "classifier" in kind else LlamaForCausalLM)(config), 0.4).eval()


def batch() -> dict[str, torch.Tensor]:
    """Returns two rows, one of them padded, whose prompts end with the tokens 5 and 6."""
    ids = torch.tensor([[3, 9, 5, 6, 11, 14], [7, 5, 6, 12, 0, 0]])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch()).logits


def adapted(kind: str, config: Any) -> PeftModel:
    model = get_peft_model(base(kind), config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            angles = torch.arange(parameter.numel()) * 1.3 + zlib.crc32(name.encode()) % 100
            parameter.data = (0.8 * angles.sin()).view_as(parameter)
    return model.eval()


def write(folder: Path) -> None:
    """Saves an adapter of each kind, a setting and costs, with what they compute."""
    models = {
        "fanlora": adapted("fanlora", FanLoraConfig(r=2, task_type="CAUSAL_LM", rank_pattern={"up_proj": 1})),
        "fanlora-pruned": adapted("fanlora", FanLoraConfig(r=2, task_type="CAUSAL_LM")),
        "fanlora-classifier": adapted(
            "classifier", FanLoraConfig(r=2, task_type="SEQ_CLS", target_modules=["v_proj"])
        ),
        **{
            f"para-{pooling}": adapted(
                "para", ParaConfig(r=2, pooling=pooling, task_type="CAUSAL_LM", init_para_weights=False, **options)
            )
            for pooling, options in PARA.items()
        },
    }
    pruned = models["fanlora-pruned"]
    scores = pruned.score_modules([{**batch(), "labels": batch()["input_ids"]}], num_points=2, progress=False)
    setting: FanLoraSetting = pruned.prune_modules(scores.select(keep=2))
    for kind, model in models.items():
        model.save_pretrained(folder / kind)
    export_lora(pruned, folder / "plain-lora")
    setting.save_pretrained(folder / "setting")
    parameters = {name: 100 + index for index, name in enumerate(scores)}
    costs = ModuleCosts("vllm", 1e-2, 1e-3, 1e-6, parameters, 0.01, ((9, 1_600, 1.01), (4, 400, 1.004)), {"r": 2})
    costs.save(folder / "costs.json")
    computed = {kind: logits(model) for kind, model in models.items()}
    save_file({**computed, "plain-lora": computed["fanlora-pruned"].clone()}, folder / "logits.safetensors")
    facts = {"kept": setting.names, "blocks": setting.to_dict()["blocks"], "slowdown": costs.slowdown(setting.names)}
    assert all(map(math.isfinite, scores.values()))
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    for picture in folder.rglob("*.png"):
        picture.unlink()


if __name__ == "__main__":
    write(EARLIER / __version__.removesuffix(".dev0"))
