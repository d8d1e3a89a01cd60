"""Exports a FanLoRA adapter as a plain LoRA adapter, which can be loaded without this package."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora.variants import MiCALinearVariant
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch.nn import functional

from ..sharing.writing import staged
from .candidates import adapted_layers, exact_names, is_linear
from .config import FanLoraConfig
from .model import FanLoraModel
from .reading import read_back
from .scoring import usable_adapter


_HEADS = {"classifier", "score"}
"""The names in `modules_to_save` that other LoRA loaders support: the heads of classification models."""


def export_lora(model: PeftModel, save_directory: str | os.PathLike[str], *, adapter_name: str | None = None) -> None:
    """Saves an adapter as a plain LoRA adapter: y = W x + (α/r) B A x, with the same r and α for all modules.

    PEFT loads it with the same output, with or without this package; so do engines that only read r, α and the names
    of the modules, such as vLLM and llama.cpp's converter. rsLoRA is converted to the α that gives its factor α/√r. If
    `rank_pattern` or `alpha_pattern` made the modules differ, all get the highest rank, by padding with zeros, and the
    same factor, by scaling B. A trained classification head (`classifier`, `score`) is included; PEFT and vLLM load
    it. Features that plain LoRA does not have are refused. Embeddings are not included: if the vocabulary was
    extended, serve the adapter on a base model that was saved afterwards.

    The result is loaded with PEFT's LoRA and compared before it is moved to the folder.

    Args:
        model: a `PeftModel` with a FanLoRA adapter, pruned or not.
        save_directory: the folder, created if needed.
        adapter_name: the adapter; None for the active one.

    Raises:
        ValueError: the model has no FanLoRA adapter of this name, it is merged, or it has features beyond plain LoRA.
        RuntimeError: the exported adapter differs when loaded as LoRA; the folder is unchanged.

    Examples:
        >>> export_lora(model, "plain-lora")
        >>> PeftModel.from_pretrained(base, "plain-lora")
    """
    tuner = getattr(model, "base_model", None)
    if not isinstance(tuner, FanLoraModel):
        raise ValueError(f"export_lora needs a PeftModel with a FanLoRA adapter, not a {type(model).__name__}.")
    adapter_name = usable_adapter(tuner, adapter_name)
    config = tuner.peft_config[adapter_name]
    layers = adapted_layers(tuner.model, adapter_name)
    _refuse_more_than_plain_lora(config, layers, adapter_name)

    rank = max(layer.r[adapter_name] for layer in layers.values())
    scaling = max((layer.scaling[adapter_name] for layer in layers.values()), key=abs) or 1.0
    alpha, names = scaling * rank, exact_names(layers, tuner.model)
    plain = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha == int(alpha) else alpha,
        target_modules=names if isinstance(names, str) else sorted(names),
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state_dict.items()}
    for name, layer in layers.items():
        down, up = (f"base_model.model.{name}.lora_{part}.weight" for part in "AB")
        missing = rank - layer.r[adapter_name]
        tensors[down] = functional.pad(tensors[down], (0, 0, 0, missing))
        tensors[up] = functional.pad(tensors[up], (0, missing)) * (layer.scaling[adapter_name] / scaling)
    with staged(Path(save_directory)) as stage:
        save_file(tensors, stage / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        plain.save_pretrained(str(stage))
        read_back(str(stage), tuner.model, adapter_name)


def _refuse_more_than_plain_lora(config: FanLoraConfig, layers: Mapping[str, Any], adapter_name: str) -> None:
    for name in ("trainable_token_indices", "target_parameters", "layer_replication", "lora_bias"):
        if getattr(config, name, None):
            raise ValueError(
                f"Plain LoRA has no {name}: this adapter would lose {getattr(config, name)!r}. Share it with "
                "save_pretrained instead."
            )
    others = sorted(set(config.modules_to_save or ()) - _HEADS)
    if others:
        raise ValueError(
            f"Of modules_to_save, LoRA loaders only support classification heads ({', '.join(sorted(_HEADS))}): this "
            f"adapter would lose {others!r}. Share it with save_pretrained instead."
        )
    if config.mutates_base_weights:
        raise ValueError(
            f"This adapter was made with init_lora_weights={config.init_lora_weights!r}, which changed the base "
            "weights. Save it with save_pretrained(..., path_initial_model_for_weight_conversion=...), which converts "
            "it to the original weights, then load and export that."
        )
    for name, layer in layers.items():
        variant = layer.lora_variant.get(adapter_name)
        if variant is not None and not isinstance(variant, MiCALinearVariant):  # MiCA's is plain LoRA once trained
            raise ValueError(
                f"Plain LoRA cannot express {name}, a {type(variant).__name__}. Share the adapter with "
                "save_pretrained instead."
            )
        if not is_linear(layer):
            raise ValueError(f"Plain LoRA is for linear layers, {name} is a {type(layer.get_base_layer()).__name__}.")
