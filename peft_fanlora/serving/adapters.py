"""Checks for adapters of both methods: their names, and that their saved tensors fit the model."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


_PEFT_PARTS = {"model", "base_layer", "weight", "bias", "original_module", "modules_to_save", "token_adapter"}
"""Further names in the parameter names of a PEFT model."""


@contextmanager
def taken_back(tuner: Any, model: Any, adapter_name: str, *, is_known: bool) -> Iterator[None]:
    """Removes the configuration of an adapter again if the adapter could not be added.

    Args:
        tuner: the tuner, which already has the configuration.
        model: the model to adapt.
        adapter_name: the adapter's name.
        is_known: whether the model had the adapter before.
    """
    try:
        yield
    except Exception:
        if not is_known:
            tuner.peft_config.pop(adapter_name, None)
            if not getattr(model, "peft_config", None) and hasattr(model, "_hf_peft_config_loaded"):
                model._hf_peft_config_loaded = False  # transformers' `add_adapter` sets it before anything else
        raise


def require_usable_names(model: nn.Module, new: str, names: Collection[str], own_parts: Collection[str]) -> None:
    """Checks that no adapter has the name of a part of the model.

    PEFT finds the parameters of an adapter by `.name.` in their names. With an adapter "mlp", the files of all other
    adapters would lack the parameters in a module called `mlp`.

    Args:
        model: the model to adapt.
        new: the name of the new adapter.
        names: the names of all its adapters. A single adapter may have the name of a part, since no other is affected.
        own_parts: the names that the method uses in its own layers.

    Raises:
        ValueError: the name is empty, contains a dot, is an absolute path, or is the name of a part.
    """
    if not new or "." in new:
        raise ValueError(
            f"adapter_name={new!r} is empty or contains a dot, which parameter names cannot: leave it out."
        )
    if PurePosixPath(new).is_absolute() or PureWindowsPath(new).anchor:
        raise ValueError(
            f"adapter_name={new!r} is a path, and the adapter would be saved there instead of in the folder that is "
            "passed to save_pretrained: choose a name that does not begin with a slash or a drive."
        )
    parts = _PEFT_PARTS.union(_parts_of(model), own_parts) if len(names) > 1 else _PEFT_PARTS
    refused = [name for name in (new, *names) if name in parts]
    if refused:
        raise ValueError(
            f"adapter_name={refused[0]!r} is also the name of a part of this model. PEFT would treat that part's "
            "parameters as this adapter's, and omit them from the files of all others: choose another name, such as "
            f"'adapter-{refused[0]}'."
        )


def _parts_of(model: nn.Module) -> Iterator[str]:
    """Yields the name of each module and parameter of the base model, relative to its parent."""
    waiting: list[Any] = [model]
    while waiting:
        module = waiting.pop()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            waiting.append(getattr(module, "base_layer" if isinstance(module, BaseTunerLayer) else "original_module"))
        else:
            yield from (*module._modules, *module._parameters, *module._buffers)
            waiting.extend(module.children())


def require_fit(state_dict: Mapping[str, Any], adapter_name: str, prefix: str) -> None:
    """Checks that saved tensors fit the model, and warns if only some of them do.

    Args:
        state_dict: the tensors; the names of those that fit contain the adapter's name.
        adapter_name: the adapter's name.
        prefix: the prefix of the method's own parameter names.

    Raises:
        ValueError: no tensor fits, so that the adapter would have no effect.
    """
    saved = [key for key in state_dict if f".{prefix}" in key]
    strange = [key for key in saved if f".{adapter_name}." not in f"{key}."]
    if not strange:
        return
    what = f"{len(strange)} of the {len(saved)} tensors to load, such as {strange[0]!r},"
    if len(strange) == len(saved):
        raise ValueError(
            f"{what} have no place in adapter {adapter_name!r}: it would have no effect. Load it on the model that it "
            "was trained on; if the model's modules have been renamed since, pass a `key_mapping` to load_adapter."
        )
    warnings.warn(
        f"{what} have no place in adapter {adapter_name!r} and are ignored: it does not adapt these modules.",
        stacklevel=4,
    )
