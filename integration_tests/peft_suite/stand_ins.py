"""What stands in for `LoraConfig` in PEFT's tests.

PEFT's tables name LoRA more often than any other method, so that a method which takes LoRA's place in them gets the most
rows. FanLoRA takes every option of LoRA. PARA takes the ones that it has too, under LoRA's names; rows with others are
not PARA's.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from peft import LoraConfig, PeftConfig

from peft_fanlora import FanLoraConfig, ParaConfig


class OnlyLora(Exception):
    """An option that LoRA has and PARA has not; no test expects this error, so that it always shows."""


PARA_NAMES = {
    "lora_dropout": "para_dropout",
    "init_lora_weights": "init_para_weights",
    "init_weights": "init_para_weights",
}
"""LoRA's options that PARA calls by another name; `init_weights` is what the tests pass to a method they don't know."""
WITHOUT_MEANING = {"lora_alpha": None, "use_rslora": False, "bias": "none", "fan_in_fan_out": None}
"""LoRA's options that don't apply to PARA, and the one value (None: any) that asks for nothing."""


class ParaForLora(ParaConfig):
    """Makes a `ParaConfig` from LoRA's options.

    Attributes:
        in_table: whether a table is being made; its rows with options that PARA has not stay LoRA's.
    """

    in_table = False

    def __new__(cls, *args: Any, **options: Any) -> Any:
        if args:
            options = {**dict(zip([field.name for field in fields(LoraConfig)], args, strict=False)), **options}
        try:
            return ParaConfig(**para_options(options))
        except OnlyLora:
            if cls.in_table:
                return LoraConfig(**options)
            raise


def para_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns LoRA's options as PARA's.

    Raises:
        OnlyLora: PARA has no such option.
    """
    known = {field.name for field in fields(ParaConfig)}
    translated = {}
    for name, value in options.items():
        para_name = PARA_NAMES.get(name, name)
        if para_name == "init_para_weights" and not isinstance(value, bool):
            raise OnlyLora(f"{name}={value!r}")
        if para_name in known:
            translated[para_name] = value
        elif name not in WITHOUT_MEANING or WITHOUT_MEANING[name] not in (None, value):
            raise OnlyLora(f"{name}={value!r}")
    return translated


STAND_INS: dict[str, type[PeftConfig]] = {"FanLoRA": FanLoraConfig, "PARA": ParaForLora}
CONFIGS: dict[str, type[PeftConfig]] = {"FanLoRA": FanLoraConfig, "PARA": ParaConfig}


def configs_in(value: Any) -> Iterator[type[PeftConfig]]:
    """Yields the configuration classes in a row of a table, however deep they lie."""
    if isinstance(value, type):
        if issubclass(value, PeftConfig):
            yield value
    elif isinstance(value, PeftConfig):
        yield type(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from configs_in(part)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for part in value:
            yield from configs_in(part)


def row_for(method: str, values: Sequence[Any]) -> list[Any] | None:
    """Returns a row of a table for the method, or None where the row is another method's."""
    ours = STAND_INS[method], CONFIGS[method]
    if not any(issubclass(config, ours) for config in configs_in(values)):
        return None
    values = [_without_lora_tag(value) for value in values]
    if method == "FanLoRA":
        return [_with_fewer_linear_layers(value) for value in values]
    if _targets_more_than_linear_layers(values):
        return None
    try:
        row = [
            ParaConfig if value is ParaForLora else para_options(value) if isinstance(value, dict) else value
            for value in values
        ]
    except OnlyLora:
        return None
    if "MLP" in values:  # a row of the MLP's input is one token, among which attention has nothing to choose
        row = [{**value, "pooling": "mean"} if isinstance(value, dict) else value for value in row]
    row = [_with_prompt_end(value) for value in row]
    return ["para" if value == "lora" else value for value in row]


def _with_prompt_end(value: Any) -> Any:
    """Returns the options of a row for causal models, which are trained without labels, with the prompt's last token."""
    if not isinstance(value, dict) or value.get("task_type") != "CAUSAL_LM":
        return value
    return {**value, "prompt_end_token_ids": [1]}


def _without_lora_tag(value: Any) -> Any:
    """Returns the tags of a model card without the one by which the Hub knows adapters of PEFT's own type LORA."""
    return [tag for tag in value if tag != "lora"] if isinstance(value, list) else value


def _with_fewer_linear_layers(value: Any) -> Any:
    """Returns the options of a row without those layers of "all-linear" which its test cannot adapt.

    Feature extraction does not use a pooler. OPT's MLP sees its tokens in one row, and PEFT's aLoRA, which looks for the
    invocation tokens of each sequence, cannot tell these apart there.
    """
    if not isinstance(value, dict) or value.get("target_modules"):
        return value
    if value.get("task_type") == "FEATURE_EXTRACTION":
        return {**value, "exclude_modules": ["pooler.dense"]}
    if value.get("alora_invocation_tokens"):
        return {**value, "exclude_modules": ["fc1", "fc2"]}
    return value


def _targets_more_than_linear_layers(values: Sequence[Any]) -> bool:
    """Says whether a row is about convolutions, embeddings or attention modules, as far as names tell."""
    for value in values:
        targets = value.get("target_modules") if isinstance(value, dict) else getattr(value, "target_modules", None)
        names = " ".join(targets) if isinstance(targets, (list, set)) else str(targets)
        linear = "EmbConv1D" in values  # transformers' Conv1D is a linear layer
        if re.search("emb|conv[23]d|mha|convolution" if linear else "emb|conv|mha", names):
            return True
    return False
