"""Runs the scoring of a model on calibration batches, in inference mode, and restores its state."""

import random
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from operator import length_hint
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer, LoraModel
from torch import nn
from tqdm.auto import tqdm

from ..serving.sharding import is_sharded
from .arguments import check_count
from .candidates import lora_factors, lora_modules, model_type, num_layers
from .gated_loss import Batch
from .gates import InitialFactors, module_gates
from .importance import Method, Score, find_score, score_batches
from .modules import ModuleName
from .scores import ImportanceScores


def score_adapter(
    tuner: LoraModel,
    dataloader: Iterable[Batch] | None,
    method: Method,
    *,
    num_batches: int | None,
    num_points: int,
    adapter_name: str | None,
    initial_factors: Mapping[str, dict[str, InitialFactors]],
    progress: bool,
) -> ImportanceScores:
    """Returns the score of each module of an adapter, see `FanLoraModel.score_modules`.

    Args:
        tuner: the model with its LoRA layers.
        dataloader: the calibration batches; None for a score that needs none.
        method: the score.
        num_batches: how many batches to use; None for all.
        num_points: K of `path`.
        adapter_name: the adapter; None for the active one.
        initial_factors: for each adapter, the argument `initial` of `gates.module_gates`.
        progress: whether to show a progress bar, which counts forward passes.
    """
    score = find_score(method)
    _check_arguments(score, dataloader, num_batches, num_points)
    adapter_name = usable_adapter(tuner, adapter_name)
    layers = scorable_modules(tuner.model, adapter_name)
    model: Any = tuner.model
    loaded = () if dataloader is None else dataloader  # not `or`: a streaming dataloader has no length
    length = length_hint(loaded, 0) or None
    total = length if num_batches is None else min(num_batches, length or num_batches)
    passes = None if total is None else total * score.passes(len(layers), num_points)
    title = f"Scoring {len(layers)} modules by {score.name}"
    with (
        inference_state(tuner, adapter_name),
        module_gates(layers, adapter_name, initial_factors.get(adapter_name, {})) as gates,
        _passes_shown(model, passes, title, progress and score.needs_data),
    ):
        batches = (prepared(batch, model) for batch in islice(loaded, num_batches))
        values, num_tokens = score_batches(model, gates, score, batches, num_points)
    facts = {
        "num_points": num_points if score.uses_points else None,
        "num_batches": num_batches,
        "base_model_name_or_path": tuner.peft_config[adapter_name].base_model_name_or_path,
        "peft_version": peft.__version__,
        "transformers_version": transformers.__version__,
    }
    values_by_name = dict(zip(layers, values.tolist(), strict=True))
    calibration = {key: value for key, value in facts.items() if value is not None}
    return _scores_of(model, values_by_name, method=score.name, num_tokens=num_tokens, calibration=calibration)


def check_selection(tuner: LoraModel, adapter_name: str | None = None, **selection: Any) -> None:
    """Checks before training that its scores can be selected from, whatever they will be.

    Args:
        tuner: the model with its LoRA layers.
        adapter_name: the adapter; None for the active one.
        selection: the arguments of `ImportanceScores.select`.

    Raises:
        ValueError: the adapter has no modules to score, or `select` refuses the arguments.
    """
    layers = scorable_modules(tuner.model, usable_adapter(tuner, adapter_name))
    equal = _scores_of(tuner.model, dict.fromkeys(layers, 1.0), method="none", num_tokens=0, calibration={})
    equal.select(**selection)


def _scores_of(model: nn.Module, values: Mapping[str, float], **facts: Any) -> ImportanceScores:
    depths = num_layers(model, map(ModuleName.parse, values))
    return ImportanceScores(values, num_layers=depths, model_type=model_type(model), **facts)


def _check_arguments(
    score: Score, dataloader: Iterable[Batch] | None, num_batches: int | None, num_points: int
) -> None:
    """Checks the arguments of `FanLoraModel.score_modules` that do not depend on the model.

    Raises:
        ValueError: one is out of range, or there is no calibration data.
    """
    if num_batches is not None:
        check_count("num_batches", num_batches)
    check_count("num_points", num_points)
    if dataloader is None and score.needs_data:
        raise ValueError(f"method={score.name!r} needs calibration data; pass a dataloader.")
    if isinstance(dataloader, str) or not (
        dataloader is None or hasattr(dataloader, "__iter__") or hasattr(dataloader, "__getitem__")
    ):
        raise ValueError(f"`dataloader` is {dataloader!r}; pass an iterable of batches, such as a DataLoader.")


@contextmanager
def _passes_shown(model: nn.Module, total: int | None, title: str, is_shown: bool) -> Iterator[None]:
    """Shows a progress bar that counts the forward passes of a model."""
    if not is_shown:
        yield
        return
    with tqdm(total=total, desc=title) as bar:

        def count(*call: Any) -> None:  # must return None, since a hook's return value replaces the output
            bar.update()

        hook = model.register_forward_hook(count)
        try:
            yield
        finally:
            hook.remove()


def usable_adapter(tuner: LoraModel, adapter_name: str | None) -> str:
    """Returns the name of the adapter to work on, after checking that it exists and is in use.

    Raises:
        ValueError: the adapter does not exist, is merged or disabled, or several are active and none is named.
    """
    if adapter_name is None:
        if len(tuner.active_adapters) != 1:
            raise ValueError(
                f"{len(tuner.active_adapters)} adapters are active ({tuner.active_adapters}): choose one with "
                "`adapter_name`."
            )
        (adapter_name,) = tuner.active_adapters
    if adapter_name not in tuner.peft_config:
        raise ValueError(f"There is no adapter {adapter_name!r}; this model has {sorted(tuner.peft_config)}.")
    lora_layers = [module for module in tuner.model.modules() if isinstance(module, LoraLayer)]
    if any(layer.merged for layer in lora_layers):
        raise ValueError("The adapter is merged into the base weights; call `unmerge_adapter()` first.")
    if any(layer.disable_adapters for layer in lora_layers):
        raise ValueError("The adapters are disabled; call `enable_adapter_layers()` first.")
    return adapter_name


def scorable_modules(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Returns the modules of an adapter that are scored and pruned, by name and in the model's order.

    Raises:
        ValueError: there are none, or their weights are sharded by FSDP or DeepSpeed.
    """
    layers = lora_modules(model, adapter_name)
    if not layers:
        raise ValueError(
            f"Adapter {adapter_name!r} adapts no linear layer that FanLoRA chooses among; embeddings, heads and "
            "vision towers are not scored. Use target_modules='all-linear'."
        )
    factors = (factor for layer in layers.values() for factor in lora_factors(layer, adapter_name))
    if is_sharded(factors):
        raise ValueError(
            f"The weights of adapter {adapter_name!r} are sharded over processes, as by FSDP or DeepSpeed ZeRO-3, so "
            "that its modules cannot run alone or be removed. Save the adapter, load it in a single process, score and "
            "prune it there, and start the next run from the saved result."
        )
    return layers


@contextmanager
def inference_state(tuner: LoraModel, adapter_name: str) -> Iterator[None]:
    """Context with eval mode, only one adapter active and no parameter to train. Everything is restored afterwards."""
    training = [(module, module.training) for module in tuner.modules()]
    requires_grad = [(parameter, parameter.requires_grad) for parameter in tuner.parameters()]
    active = tuner.active_adapter
    devices = {parameter.device for parameter in tuner.parameters() if parameter.device.type == "cuda"}
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            tuner.set_adapter(adapter_name)
            tuner.requires_grad_(False)
            tuner.eval()
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        tuner.set_adapter(active)
        for module, flag in training:
            module.training = flag
        for parameter, flag in requires_grad:
            parameter.requires_grad = flag


_LOADER = (
    "pass DataLoader(rows, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)), or the "
    "result of your trainer's get_eval_dataloader()."
)


def prepared(batch: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Moves a batch to the model's device, and disables the KV cache if the model has one.

    Raises:
        ValueError: the batch is not a dict of tensors with labels for its rows.
    """
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"The dataloader returned a {type(batch).__name__} instead of a dict of the forward's arguments; use the "
            "data collator of your trainer. Pass a single batch as a list: score_modules([batch])."
        )
    _check_tensors(batch)
    device = next((each.device for each in model.parameters() if not each.is_meta), torch.device("cpu"))
    moved = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    if getattr(getattr(model, "config", None), "use_cache", False):
        moved.setdefault("use_cache", False)
    return moved


def _check_tensors(batch: Mapping[str, Any]) -> None:
    for name in ("input_ids", "attention_mask", "labels"):
        value = batch.get(name)
        if value is not None and not isinstance(value, torch.Tensor):
            raise ValueError(
                f"`{name}` of a calibration batch is a {type(value).__name__} instead of a tensor, as in a row of a "
                f"dataset or a batch that was not collated: {_LOADER}"
            )
    tokens, labels = batch.get("input_ids"), batch.get("labels")
    if tokens is None or labels is None:
        return
    if tokens.ndim < 2:
        raise ValueError(
            f"`input_ids` of a calibration batch has the shape {tuple(tokens.shape)}, that of a single row, but "
            f"batches need rows and tokens: {_LOADER}"
        )
    if labels.ndim == 0 or len(labels) != len(tokens):
        raise ValueError(
            f"`labels` of a calibration batch has the shape {tuple(labels.shape)}, but `input_ids` has {len(tokens)} "
            "rows: each row needs its own labels."
        )
