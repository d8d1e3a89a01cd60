"""An adapter of this package as it lies in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from .fanlora.config import FanLoraConfig
from .fanlora.modules import ModuleName
from .para.config import ParaConfig


Config = TypeVar("Config", FanLoraConfig, ParaConfig)


@dataclass(frozen=True)
class SavedAdapter(Generic[Config]):
    """What can be said of an adapter without its base model.

    Attributes:
        config: its configuration.
        folder: where its files are.
        name: what the model called it. PEFT saves "default" at the top, all others in a subfolder of their name.
    """

    config: Config
    folder: Path
    name: str = "default"

    @property
    def subfolder(self) -> str | None:
        """The adapter's place in what is shared, None for the top."""
        return None if self.name == "default" else self.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor; none where the weights are not in safetensors."""
        if not self._weights.exists():
            return {}
        with safe_open(self._weights, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    @property
    def num_parameters(self) -> int:
        """How many numbers the file has."""
        return sum(map(prod, self.shapes.values()))

    @property
    def num_bytes(self) -> int:
        """The size of the file with the weights."""
        return self._weights.stat().st_size if self._weights.exists() else 0

    @property
    def modules(self) -> list[ModuleName]:
        """The modules that have LoRA, in the order of their layers."""
        names = {
            name.partition(".lora_")[0].removeprefix("base_model.model.") for name in self.shapes if ".lora_" in name
        }
        return sorted(map(ModuleName.parse, names))

    @property
    def _weights(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME
