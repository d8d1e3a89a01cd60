"""The modules that PARA scales in each architecture, and the scaled outputs of fused projections.

The method scales the query, value and up projections, and not key, gate, output and down [S]. If a model fuses some of
these into one linear layer, only the outputs that belong to Q, V or U are scaled [ours].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .core.scaling import OutputSlices


_LLAMA = ["q_proj", "v_proj", "up_proj"]
_FC1 = ["q_proj", "v_proj", "fc1"]
_BERT = ["query", "value", "intermediate.dense"]
_NEOX = ["query_key_value", "dense_h_to_4h"]
_T5 = ["q", "v", "wi", "wi_1"]

_ATTENTION = ["q_proj", "v_proj"]

_ARCHITECTURES: list[tuple[str, list[str] | str]] = [
    ("llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text stablelm smollm3", _LLAMA),
    ("olmo olmo2 olmo3 cohere cohere2 granite exaone4", _LLAMA),
    # Experts are tensors rather than modules, and each sees only some of the tokens: attention only [ours].
    ("mixtral qwen2_moe qwen3_moe olmoe granitemoe", _ATTENTION),
    ("gemma3", r".*language_model\..*\.(q_proj|v_proj|up_proj)"),
    ("phi3", ["qkv_proj", "gate_up_proj"]),
    ("glm glm4", [*_ATTENTION, "gate_up_proj"]),
    ("phi opt bart mbart whisper vit m2m_100 marian pegasus", _FC1),
    ("gpt2", ["c_attn", "c_fc"]),
    ("gpt_neo starcoder2", [*_ATTENTION, "c_fc"]),
    ("gptj", [*_ATTENTION, "fc_in"]),
    ("codegen", ["qkv_proj", "fc_in"]),
    ("gpt_neox falcon bloom persimmon", _NEOX),
    ("mpt", ["Wqkv", "ffn.up_proj"]),
    ("bert roberta xlm-roberta electra layoutlm camembert", _BERT),
    ("distilbert", ["q_lin", "v_lin", "lin1"]),
    ("deberta", ["in_proj", "intermediate.dense"]),
    # DeBERTa-v2 uses the same query projection for relative positions and tokens: V and U only [ours].
    ("deberta-v2", ["value_proj", "intermediate.dense"]),
    ("t5 mt5 umt5", _T5),
]

DEFAULT_TARGETS: dict[str, list[str] | str] = {
    model_type: targets for model_types, targets in _ARCHITECTURES for model_type in model_types.split()
}


def _qkv(groups: int, queries: int, head_dim: int, keys: int = 1) -> OutputSlices:
    """Returns `queries` query heads, then `keys` key heads, then as many value heads, in each group."""
    return OutputSlices(groups, ((queries * head_dim, True), (keys * head_dim, False), (keys * head_dim, True)))


def _heads(config: Any) -> tuple[int, int, int]:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def _qkv_in_thirds(config: Any) -> OutputSlices:
    heads, _, head_dim = _heads(config)
    return _qkv(1, heads, head_dim, keys=heads)


def _qkv_by_head(config: Any) -> OutputSlices:
    heads, _, head_dim = _heads(config)
    return _qkv(heads, 1, head_dim)


def _qkv_grouped(config: Any) -> OutputSlices:
    heads, key_value_heads, head_dim = _heads(config)
    return _qkv(1, heads, head_dim, keys=key_value_heads)


def _falcon(config: Any) -> OutputSlices:
    heads, _, head_dim = _heads(config)
    if config.new_decoder_architecture:
        return _qkv(config.num_kv_heads, heads // config.num_kv_heads, head_dim)
    return _qkv(1, heads, head_dim) if config.multi_query else _qkv(heads, 1, head_dim)


def _codegen(config: Any) -> OutputSlices:
    width = config.hidden_size // 4
    return OutputSlices(4, ((width, True), (width, True), (width, False)))


def _gate_up(config: Any) -> OutputSlices:
    return OutputSlices(1, ((config.intermediate_size, False), (config.intermediate_size, True)))


FUSED_PROJECTIONS: dict[tuple[str, str], Callable[[Any], OutputSlices]] = {
    ("gpt2", "c_attn"): _qkv_in_thirds,
    ("mpt", "Wqkv"): _qkv_in_thirds,
    ("gpt_neox", "query_key_value"): _qkv_by_head,
    ("bloom", "query_key_value"): _qkv_by_head,
    ("persimmon", "query_key_value"): _qkv_by_head,
    ("deberta", "in_proj"): _qkv_by_head,
    ("falcon", "query_key_value"): _falcon,
    ("codegen", "qkv_proj"): _codegen,
    ("phi3", "qkv_proj"): _qkv_grouped,
    ("phi3", "gate_up_proj"): _gate_up,
    ("glm", "gate_up_proj"): _gate_up,
    ("glm4", "gate_up_proj"): _gate_up,
}


def scaled_outputs(model_config: Any, module_name: str, out_features: int) -> OutputSlices:
    """Returns the scaled outputs of a module: all of them, except for known fused projections.

    Args:
        model_config: the configuration of the model, or None.
        module_name: the module's full name.
        out_features: its number of outputs.

    Raises:
        ValueError: the module does not have the layout of its architecture.
    """
    model_type = getattr(model_config, "model_type", "")
    layout = FUSED_PROJECTIONS.get((model_type, module_name.rpartition(".")[2]))
    if layout is None:
        return OutputSlices(1, ((out_features, True),))
    slices = layout(model_config)
    if slices.num_outputs != out_features:
        raise ValueError(
            f"{module_name} has {out_features} outputs, but its fused projection in a {model_type!r} model should "
            f"have {slices.num_outputs}: exclude it with exclude_modules=[{module_name!r}]."
        )
    return slices


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """Returns the (inputs, outputs) of a linear layer: torch's, GPT-2's `Conv1D`, or a quantised one.

    Raises:
        TypeError: the module is not linear.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    shape = getattr(module, "in_features", None), getattr(module, "out_features", None)
    adapted = hasattr(module, "base_layer")  # as all layers of PEFT's tuners have
    if adapted or not all(isinstance(size, int) for size in shape):
        raise TypeError(
            f"PARA scales the output of linear layers, and {type(module).__name__} is not one: set target_modules to "
            "linear layers."
        )
    return shape  # type: ignore[return-value]
