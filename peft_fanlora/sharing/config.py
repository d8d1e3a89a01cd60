"""The base class of both methods' configurations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from peft import PeftConfig

from .writing import staged


if TYPE_CHECKING:
    from .reading import AdapterFields


class StoredConfig(PeftConfig):
    """A configuration whose file is validated when loaded and written atomically.

    Attributes:
        own_files: the names of the adapter's files besides its weights and its configuration.
    """

    own_files: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def _shape(cls) -> type[AdapterFields]:
        """Returns the expected types of the fields."""
        raise NotImplementedError

    def check_types(self) -> None:
        """Raises a ValueError that names the field and the value if a field has a wrong type."""
        from .reading import checked

        checked(self._shape(), vars(self), type(self).__name__)

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> Any:
        """Returns the content of an `adapter_config.json`.

        Raises:
            ValueError: it is not a JSON object, repeats a key, or exceeds the limits on size and nesting.
        """
        from .reading import read_json, short

        if not isinstance(content := read_json(Path(path_json_file)), dict):
            raise ValueError(
                f"{path_json_file} has {short(content)}, but an adapter's configuration is a JSON object."
            )
        return super().from_json_file(path_json_file, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as a dict like PEFT, with sorted sets, so that equal ones give equal files."""
        return {key: sorted(value) if isinstance(value, set) else value for key, value in super().to_dict().items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves `adapter_config.json`."""
        with staged(Path(save_directory)) as stage:
            super().save_pretrained(str(stage), **kwargs)
