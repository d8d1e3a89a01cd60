"""What an engine was asked to do for PARA: `additional_config={"para": {...}}`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any


KEY = "para"


@dataclass(frozen=True)
class Options:
    """The options of an engine that serves PARA.

    Attributes:
        lora: whether it also serves LoRA adapters, at vLLM's cost for every row.
    """

    lora: bool = False


def read_options(additional_config: Any) -> Options | None:
    """Returns the options in vLLM's `additional_config`; None where it does not ask for PARA.

    Raises:
        ValueError: there is an option that does not exist, or one of another type.
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
