"""The format of `fanlora_setting.json`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

from ..version import __version__
from .modules import ModuleName


SETTING_NAME = "fanlora_setting.json"
HEAT_MAP = "fanlora_importance.png"
FORMAT_VERSION = 1


Scored = Mapping[ModuleName, float | None]


def content_of(
    kept: Scored,
    dropped: Scored,
    *,
    num_layers: Mapping[str, int],
    model_type: str | None,
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the fields of a setting as plain JSON types."""
    blocks: dict[str, dict[str, Any]] = {}
    for choice, modules in (("kept", kept), ("dropped", dropped)):
        for module, score in modules.items():
            blocks.setdefault(module.block, {"kept": {}, "dropped": {}})[choice][module.role] = score
    return {
        "format_version": FORMAT_VERSION,
        "peft_fanlora_version": __version__,
        "model_type": model_type,
        "num_layers": dict(num_layers),
        "calibration": dict(calibration),
        "blocks": blocks,
    }


def check(content: Any, where: str) -> None:
    """Raises for content that is not a setting, and warns of fields that a later version has added.

    Args:
        content: plain JSON types.
        where: the name of the content in errors, such as the file.

    Raises:
        ValueError: the format version or the structure is wrong.
    """
    from ..sharing.reading import checked, ignore_later_fields, short
    from .shapes import SettingFile

    if not isinstance(content, Mapping):
        raise ValueError(f"{where} is {short(content)}, but a FanLoRA setting is a JSON object.")
    found = content.get("format_version")
    if type(found) is not int or found != FORMAT_VERSION:
        raise ValueError(
            f"{where} has format version {short(found)}, this peft_fanlora reads {FORMAT_VERSION}; {_remedy(content)}"
        )
    given = {key: value for key, value in content.items() if value is not None}
    ignore_later_fields(checked(SettingFile, given, where).unknown_fields(), where, stacklevel=5)
    for block, choice, role in _modules(content):
        module = ModuleName.parse(f"{block}.{role}" if block else role)
        if (module.block, module.role) != (block, role):
            raise ValueError(
                f"{where}: blocks[{short(block)}].{choice} has {short(role)}, but the module of that name is "
                f"{short(module.role)} of the block {short(module.block)}; enter it there."
            )


def _remedy(content: Mapping[Any, Any]) -> str:
    found, writer = content.get("format_version"), content.get("peft_fanlora_version")
    if type(found) is not int or found < FORMAT_VERSION:
        return f"it must be {FORMAT_VERSION}."
    if isinstance(writer, str) and writer.isprintable() and len(writer) < 40:
        return f"upgrade it with `pip install -U 'peft-fanlora>={writer}'`, the version that wrote the setting."
    return "upgrade it with `pip install -U peft-fanlora`."


def _modules(content: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for block, choices in content["blocks"].items():
        for choice in ("kept", "dropped"):
            yield from ((block, choice, role) for role in choices.get(choice, {}))


def arguments_from(content: Any, where: str) -> dict[str, Any]:
    """Returns the arguments of `FanLoraSetting` for a file's content.

    Raises:
        ValueError: see `check`.
    """
    check(content, where)
    chosen: dict[str, dict[ModuleName, float | None]] = {"kept": {}, "dropped": {}}
    for block, choice, role in _modules(content):
        chosen[choice][ModuleName.parse(f"{block}.{role}" if block else role)] = content["blocks"][block][choice][role]
    return {
        **chosen,
        "num_layers": dict(content["num_layers"]),
        "model_type": content.get("model_type"),
        "calibration": dict(content.get("calibration") or {}),
    }


def find(location: str, subfolder: str | None, download_kwargs: dict[str, Any]) -> Path:
    """Returns the path of the file, in a folder or in the cache of the Hub, after a download if needed.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(location, subfolder or "", SETTING_NAME)
    if path.is_file():
        return path
    try:
        return Path(hf_hub_download(location, SETTING_NAME, subfolder=subfolder, **download_kwargs))
    except (EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(
            f"There is no {SETTING_NAME} in {location!r}: it is neither a folder with a saved setting nor a readable "
            f"Hub repository ({type(error).__name__}). An adapter that was never pruned has no setting; a private "
            "repository needs a `token`; if the connection was lost, try again."
        ) from error
