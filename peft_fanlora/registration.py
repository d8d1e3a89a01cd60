"""Makes FanLoRA and PARA known to PEFT, as if they were methods of its own.

PEFT looks a method up by its `PeftType`, an enumeration that it closes at import. `aenum.extend_enum` adds the members
(so they are listed, compared, hashed and pickled like the built-in ones), and PEFT's own `register_peft_method` fills
its tables. No file of PEFT is changed, and no function of it replaced here; `sharing` wraps two methods for the
model cards.
"""

from aenum import extend_enum
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method


def add_peft_type(name: str) -> PeftType:
    """Returns the member of `PeftType` that is called `name`, adding it where PEFT does not have it.

    Args:
        name: the name of the method in upper case, which is also the `peft_type` in an `adapter_config.json`.
    """
    if name not in PeftType.__members__:
        extend_enum(PeftType, name, name)
    return PeftType[name]


def register(*, name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Registers a method with PEFT; to do so again with the same classes does nothing.

    The method keeps the parameter prefix of its `model_cls`: `lora_` stays shared with LoRA, whose layers FanLoRA uses.

    Args:
        name: the name of the method in lower case.
        config_cls: its configuration.
        model_cls: its tuner.

    Raises:
        RuntimeError: another package has registered a method of this name.
    """
    peft_type = add_peft_type(name.upper())
    registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    if registered is config_cls:
        return
    if registered is not None:
        raise RuntimeError(
            f"PEFT already has a method called {name!r}, registered by {registered.__module__}.{registered.__qualname__}; "
            f"{config_cls.__module__}.{config_cls.__qualname__} cannot be registered under the same name. "
            "Import only one of the two packages in a process."
        )
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
