"""The types of the fields of a FanLoRA setting and of a FanLoRA configuration."""

from typing import Annotated, Any

from pydantic import AfterValidator, Field, JsonValue

from ..sharing.reading import AdapterFields, Names, Shape, Text
from .choices import Engine


MAX_LAYERS = 10_000

_IN_NO_NAME = set('`|<>"\\')
"""Characters that would break a card's table, code or comments."""


def _module_name(name: str) -> str:
    if not name.isprintable() or _IN_NO_NAME & set(name) or not all(name.split(".")):
        raise ValueError(
            f"names joined by single dots, without control characters and {' '.join(sorted(_IN_NO_NAME))}"
        )
    return name


ModulePath = Annotated[str, AfterValidator(_module_name)]
StackPath = Annotated[str, AfterValidator(lambda name: name and _module_name(name))]
"""The name of a stack of blocks or of a block; "" in a model without numbered blocks."""
Scores = dict[ModulePath, float | None]


class Block(Shape):
    """The modules of one block."""

    kept: Scores = Field(default_factory=dict)
    dropped: Scores = Field(default_factory=dict)


class Calibration(Shape):
    """How the scores were computed. Fields that are only displayed may have any value."""

    __pydantic_extra__: dict[str, JsonValue]
    method: Text | None = None
    base_model_name_or_path: Text | None = None


class SettingFile(Shape):
    """The content of `fanlora_setting.json` in the current format version."""

    format_version: int
    peft_fanlora_version: Text | None = None
    model_type: Text | None = None
    num_layers: dict[StackPath, Annotated[int, Field(ge=1, le=MAX_LAYERS)]]
    calibration: Calibration | None = None
    blocks: dict[StackPath, Block]

    def unknown_fields(self) -> list[str]:
        """Returns the names of fields that this version does not know."""
        return sorted(
            {*(self.model_extra or ()), *(name for block in self.blocks.values() for name in block.model_extra or ())}
        )


PositiveInt = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0)]


class CostsFile(Shape):
    """The content of a file with `ModuleCosts`."""

    engine: Engine
    per_step: Share
    per_module: Share
    per_parameter: Share
    parameters: Annotated[dict[ModulePath, PositiveInt], Field(min_length=2)]
    error: Share
    measured: list[Annotated[list[float], Field(min_length=3, max_length=3)]]
    conditions: dict[Text, JsonValue]


class FanLoraFields(AdapterFields):
    """The fields of a `FanLoraConfig` that are simple types in the file; PEFT checks those of its LoRA variants."""

    r: PositiveInt
    lora_alpha: float
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    fan_in_fan_out: bool
    bias: str
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    init_lora_weights: bool | str | None
    rank_pattern: dict[str, PositiveInt] | None
    alpha_pattern: dict[str, float] | None
    target_parameters: Names | None
    layer_replication: list[Any] | tuple[Any, ...] | None
