"""A saved adapter in a folder."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Generic, TypeVar

from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open


Config = TypeVar("Config", bound=PeftConfig)


@dataclass(frozen=True)
class SavedAdapter(Generic[Config]):
    """The information about a saved adapter that does not need its base model.

    Attributes:
        config: its configuration.
        folder: the folder of its files.
        name: its name in the model. PEFT saves "default" at the top level, all others in a subfolder of their name.
    """

    config: Config
    folder: Path
    name: str = "default"

    @property
    def subfolder(self) -> str | None:
        """The subfolder of the adapter in the saved folder; None for the top level."""
        return None if self.name == "default" else self.name

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor; empty if the weights are not in safetensors.

        Raises:
            ValueError: the file is damaged.
        """
        if not self._weights.exists():
            return {}
        try:
            with safe_open(self._weights, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{self._weights} cannot be read: {error}. Save or download it again.") from error

    @property
    def num_parameters(self) -> int:
        """The number of parameters in the file."""
        return sum(map(prod, self.shapes.values()))

    @property
    def num_bytes(self) -> int:
        """The size of the weights file."""
        return self._weights.stat().st_size if self._weights.exists() else 0

    @property
    def _weights(self) -> Path:
        return self.folder / SAFETENSORS_WEIGHTS_NAME
