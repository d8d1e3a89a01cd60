"""FanLoraConfig: LoRA's configuration with a FanLoRA setting and "all-linear" as the default."""

import os
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft import LoraConfig, PeftConfig, PeftType

from ..registration import add_peft_type
from ..sharing.config import StoredConfig
from ..sharing.writing import staged
from .setting import FanLoraSetting
from .setting_file import HEAT_MAP, SETTING_NAME


if TYPE_CHECKING:
    from .shapes import FanLoraFields

_FANLORA = add_peft_type("FANLORA")

_MUTATING_INITIALISATIONS = ("pissa", "olora", "corda", "lora_ga")


@dataclass
class FanLoraConfig(StoredConfig, LoraConfig):
    """Configuration of FanLoRA: all fields of `peft.LoraConfig`, and a setting.

    Without a setting, LoRA is applied to all linear layers of the model (step a of the method [P]); `score_modules`
    and `prune_modules` then find the setting (b, c). With a setting, only its modules are adapted (d).

    Args:
        target_modules: as in LoRA; "all-linear" by default.
        setting: the modules to adapt, as a `FanLoraSetting`, a folder or a Hub repository id. It replaces
            `target_modules` and fits any model of the same model type.

    Raises:
        ValueError: a field has a wrong type, or a value that does not support pruning.
        FileNotFoundError: `setting` is neither a folder nor a repository with a setting.

    Examples:
        >>> config = FanLoraConfig(r=8, task_type="CAUSAL_LM")  # (a): LoRA on every linear layer
        >>> config = FanLoraConfig(setting="me/my-setting", r=27, task_type="CAUSAL_LM")  # (d)
    """

    target_modules: list[str] | str | None = field(
        default="all-linear",
        metadata={
            "help": "The modules to adapt, as in LoraConfig: names, a regular expression, or 'all-linear' (default)."
        },
    )
    setting: FanLoraSetting | str | os.PathLike[str] | None = field(
        default=None,
        metadata={
            "help": "The FanLoRA setting, instead of target_modules: a FanLoraSetting, a folder, or a Hub repository."
        },
    )

    own_files: ClassVar = (SETTING_NAME, HEAT_MAP)

    @classmethod
    def _shape(cls) -> type["FanLoraFields"]:
        from .shapes import FanLoraFields

        return FanLoraFields

    def __post_init__(self) -> None:
        is_from_file = self.peft_type is not None
        self.check_types()
        everywhere = self.target_modules is None or str(self.target_modules).lower() == "all-linear"
        if everywhere:
            self.target_modules = None  # LoraConfig does not allow layers_to_transform with a string
        try:
            super().__post_init__()
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            raise ValueError(  # PEFT would recurse endlessly while looking for the keyword in this class's fields
                f"FanLoraConfig: a variant of LoRA has a field that this version of PEFT does not know: {error}. "
                "Remove the field, or upgrade PEFT."
            ) from error
        self.peft_type = _FANLORA
        if everywhere:
            self.target_modules = "all-linear"
        _refuse_what_pruning_cannot_honour(self)
        if isinstance(self.setting, dict):  # from an adapter_config.json
            self.setting = FanLoraSetting.from_dict(self.setting)
        elif isinstance(self.setting, str) and is_from_file:
            raise ValueError(
                f"setting={self.setting[:60]!r} is part of a saved configuration, which must not refer to other "
                "files: replace it by the content of the setting's file, or by null."
            )
        elif isinstance(self.setting, (str, os.PathLike)):
            self.setting = FanLoraSetting.from_pretrained(self.setting)
        elif self.setting is not None and not isinstance(self.setting, FanLoraSetting):
            raise ValueError(
                f"`setting` is a {type(self.setting).__name__}: pass a FanLoraSetting, such as that of "
                "`scores.select(...)`, the folder of a saved one, or a Hub repository id."
            )

    @classmethod
    def from_lora(cls, lora: LoraConfig | str | os.PathLike[str], **download_kwargs: Any) -> "FanLoraConfig":
        """Returns the configuration that loads an existing LoRA adapter as a FanLoRA adapter, with the same output.

        Ranks, alphas, patterns, targets and all other fields are kept. `load_tenant` and `load_adapter` use it
        automatically for LoRA adapters that are added to a FanLoRA model.

        Args:
            lora: the adapter's configuration, its folder, or its Hub repository id.
            download_kwargs: how to read it from the Hub, such as `revision` or `subfolder`.

        Raises:
            ValueError: it is not a LoRA adapter, or has a field that does not support pruning.

        Examples:
            >>> model = PeftModel.from_pretrained(base, "my-lora", config=FanLoraConfig.from_lora("my-lora"))
            >>> setting = model.prune_modules(model.score_modules(dataloader).select(keep=2))
        """
        config: Any = (
            lora if isinstance(lora, PeftConfig) else PeftConfig.from_pretrained(str(lora), **download_kwargs)
        )
        if type(config) is not LoraConfig:
            where = "the configuration" if config is lora else str(lora)
            raise ValueError(f"{where} is of type {PeftType(config.peft_type).value}: pass a LoRA adapter.")
        kept = {item.name: getattr(config, item.name) for item in fields(LoraConfig) if item.init}
        return cls(**deepcopy({name: value for name, value in kept.items() if name != "peft_type"}))

    @property
    def mutates_base_weights(self) -> bool:
        """Whether the initialisation moves a part of each base weight into the adapter, as PiSSA does."""
        return str(self.init_lora_weights).lower().startswith(_MUTATING_INITIALISATIONS)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dict like PEFT, with the setting as plain JSON types."""
        content = super().to_dict()
        if isinstance(self.setting, FanLoraSetting):
            content["setting"] = self.setting.to_dict()
        return content

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves `adapter_config.json`, and the setting in a separate file beside it.

        A previously saved setting that no longer applies is removed.
        """
        with staged(Path(save_directory), own=[SETTING_NAME]) as stage:
            super().save_pretrained(str(stage), **kwargs)
            if isinstance(self.setting, FanLoraSetting):
                self.setting.write(stage)


def _refuse_what_pruning_cannot_honour(config: FanLoraConfig) -> None:
    """Raises for fields of LoraConfig whose effects on the model would remain after a module is removed."""
    if config.bias != "none":
        raise ValueError(
            f"FanLoRA does not support bias={config.bias!r}: the trained biases belong to the base model's layers and "
            "would remain after modules are pruned. Use bias='none'."
        )
    if config.init_lora_weights == "loftq":
        raise ValueError(
            "FanLoRA does not support init_lora_weights='loftq': it replaces base weights by quantised ones, which "
            "would remain after a module is pruned. Load the base model quantised and use init_lora_weights=True."
        )
    for name, reason in {
        "kasa_config": "it truncates the base weights, which would remain truncated after a module is pruned",
        "arrow_config": "its adapter routes between other adapters and has no modules of its own to score",
    }.items():
        if getattr(config, name, None) is not None:
            raise ValueError(f"FanLoRA does not support {name}: {reason}. Use LoraConfig for this adapter.")
