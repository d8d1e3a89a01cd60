"""Registers FanLoRA and PARA with PEFT, like its built-in methods.

PEFT identifies methods by `PeftType`, an enumeration with a fixed set of members. `aenum.extend_enum` adds the members,
so that they are listed, compared, hashed and pickled like the built-in ones, and PEFT's `register_peft_method` fills
its tables. No file or function of PEFT is changed here; `sharing.saving` and `serving.loading` wrap three methods of
`PeftModel`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from .sharing.saving import add_card


if TYPE_CHECKING:
    from .sharing.card import Part
    from .sharing.saved import SavedAdapter
    from .sharing.snippets import BaseModel


def add_peft_type(name: str) -> PeftType:
    """Returns the member `name` of `PeftType`, adding it if PEFT does not have it.

    Args:
        name: the method's name in upper case, which is also the `peft_type` in an `adapter_config.json`.
    """
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType[name]


def register(
    *,
    name: str,
    config_cls: type[PeftConfig],
    model_cls: type[BaseTuner],
    card: Callable[[SavedAdapter[Any], BaseModel, str], Part] | str | None = None,
) -> None:
    """Registers a method with PEFT. Repeated calls with the same classes have no effect.

    The method uses the parameter prefix of its `model_cls`: FanLoRA shares `lora_` with LoRA, whose layers it uses.

    Args:
        name: the method's name in lower case.
        config_cls: its configuration class.
        model_cls: its tuner class.
        card: a function that returns the method's part of a model card, given the saved adapter, its base model, and
            the folder or Hub id for the card's code; or its location as "package.module:function". Without it, PEFT's
            card is kept.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    peft_type = add_peft_type(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered not in (None, config_cls):
        raise RuntimeError(
            f"PEFT already has a method called {name!r}, registered by "
            f"{registered.__module__}.{registered.__qualname__}; {config_cls.__module__}.{config_cls.__qualname__} "
            "cannot be registered under the same name. Import only one of the two packages in a process."
        )
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    if card is not None:
        add_card(config_cls, card)
