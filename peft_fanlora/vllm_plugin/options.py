"""The PARA options of an engine: `additional_config={"para": {...}}`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


KEY = "para"


@dataclass(frozen=True)
class Options:
    """Options of an engine that serves PARA.

    Attributes:
        lora: whether the engine also serves LoRA adapters. vLLM then computes LoRA for every row.
    """

    lora: bool = False


def read_options(additional_config: Any) -> Options | None:
    """Returns the PARA options in vLLM's `additional_config`; None if it has no key "para".

    Raises:
        ValueError: an option is unknown or has the wrong type.
    """
    if not isinstance(additional_config, dict) or KEY not in additional_config:
        return None
    given, known = additional_config[KEY], [field.name for field in fields(Options)]
    if not isinstance(given, dict):
        raise ValueError(
            f"additional_config[{KEY!r}] is {given!r}, which is not a dict of options: pass {{}} for the defaults."
        )
    if unknown := [name for name in given if name not in known]:
        raise ValueError(f"additional_config[{KEY!r}] has no option {unknown[0]!r}: it takes {', '.join(known)}.")
    for name, value in given.items():
        if not isinstance(value, bool):
            raise ValueError(f"additional_config[{KEY!r}][{name!r}] is {value!r}: pass true or false.")
    return Options(**given)
