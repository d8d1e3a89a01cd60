"""Makes FanLoRA and PARA known to PEFT, as if they were methods of its own.

PEFT looks a method up by its `PeftType`, an enumeration that it closes at import. `aenum.extend_enum` adds the members
(so they are listed, compared, hashed and pickled like the built-in ones), and PEFT's own `register_peft_method` fills
its tables. No file of PEFT is changed, and no function of it replaced here; `sharing.saving` and
`serving.loading` wrap three methods of `PeftModel`.
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
    """Returns the member of `PeftType` that is called `name`, adding it where PEFT does not have it.

    Args:
        name: the name of the method in upper case, which is also the `peft_type` in an `adapter_config.json`.
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
    """Registers a method with PEFT; to do so again with the same classes does nothing.

    The method keeps the parameter prefix of its `model_cls`: `lora_` stays shared with LoRA, whose layers FanLoRA uses.

    Args:
        name: the name of the method in lower case.
        config_cls: its configuration.
        model_cls: its tuner.
        card: returns what the card of a saved adapter says, given the adapter, its base model, and the folder or id by
            which code names it; or where that function is, as "package.module:function". Without it PEFT's card stays.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    peft_type = add_peft_type(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered not in (None, config_cls):
        raise RuntimeError(
            f"PEFT already has a method called {name!r}, registered by {registered.__module__}.{registered.__qualname__}; "
            f"{config_cls.__module__}.{config_cls.__qualname__} cannot be registered under the same name. "
            "Import only one of the two packages in a process."
        )
    if registered is None:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    if card is not None:
        add_card(config_cls, card)
