"""Reads untrusted files: JSON within limits, and content of the expected types.

Types are checked by Pydantic, which is imported with the first file or configuration that is checked, to keep the
import of the package fast.
"""

import json
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError


MAX_BYTES = 64 * 2**20
"""The size limit of a file. A setting of a model with 100,000 linear layers has 10 MB."""
MAX_DEPTH = 64
"""The limit on nested objects and lists. A setting has four levels, with simple calibration facts."""
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+"?|[\[\]{}]', re.DOTALL)
_MESSAGE = re.compile("(?:Input should be |Value error, )?")


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("text on one line, without control characters")
    return text


Text = Annotated[str, AfterValidator(_printable)]
"""Text that is safe in a card, in a terminal and in a file name."""


class Shape(BaseModel):
    """Validates content: types are not converted, numbers must be finite, extra fields are allowed."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


Names = list[Text] | set[Text] | tuple[Text, ...]
TokenIds = list[Annotated[int, Field(ge=0)]]


class AdapterFields(Shape):
    """The fields that the configurations of all methods have."""

    base_model_name_or_path: Text | None
    revision: Text | None
    inference_mode: bool
    auto_mapping: dict[str, Text | None] | None
    target_modules: Names | Text | None
    exclude_modules: Names | Text | None
    layers_to_transform: list[int] | tuple[int, ...] | int | None
    layers_pattern: Names | Text | None
    modules_to_save: Names | None
    trainable_token_indices: TokenIds | dict[str, TokenIds] | None


AnyShape = TypeVar("AnyShape", bound=Shape)


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON (RFC 8259: UTF-8, without NaN and Infinity), repeats a key, or exceeds the limits on
            size and nesting.
    """
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than the limit of {MAX_BYTES:,}: is it another file?")
    try:
        text = file.read_bytes().decode()
        if (depth := _depth(text)) > MAX_DEPTH:
            raise ValueError(f"{depth:,} objects and lists are nested, more than the limit of {MAX_DEPTH}")
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_finite, parse_float=_finite)
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    except ValueError as error:  # from the functions below, invalid UTF-8, or an integer of thousands of digits
        raise ValueError(f"{file} cannot be read: {error}") from error


def checked(shape: type[AnyShape], content: Any, where: str) -> AnyShape:
    """Validates `content` and returns it as a `shape`.

    Args:
        shape: the expected structure.
        content: plain JSON types, or an object with attributes.
        where: the name of the content in errors, such as the file.

    Raises:
        ValueError: the structure differs; the error names the first wrong value, its place and what is expected.
    """
    try:
        return shape.model_validate(content)
    except ValidationError as error:
        raise ValueError(_explain(error, content, where)) from None


def ignore_later_fields(names: Sequence[str], where: str, *, stacklevel: int) -> None:
    """Warns of fields that a later version has added to a file, if there are any.

    Args:
        names: the names of the unknown fields.
        where: the name of the content in the warning, such as the file.
        stacklevel: the caller that the warning names, counted from the caller of this function.
    """
    if names:
        warnings.warn(
            f"{where} has fields that this version of peft_fanlora does not know and ignores: {short(names)}. It "
            "was written by a later version; upgrade with `pip install -U peft-fanlora`.",
            stacklevel=stacklevel,
        )


def short(value: Any) -> str:
    """Returns a short form of a value for errors."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a very large {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def _depth(text: str) -> int:
    depth = deepest = 0
    for found in _STRING_OR_BRACKET.finditer(text):
        if found.group() in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif found.group() in "]}":
            depth -= 1
    return deepest


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(content := dict(pairs)) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(
            f"{short(key)} appears {'twice' if count == 2 else f'{count} times'} in one object; keep one of them"
        )
    return content


def _finite(text: str) -> float:
    if abs(number := float(text)) < float("inf"):
        return number
    raise ValueError(f"{short(text)} is not a finite number")


def _explain(error: ValidationError, content: Any, where: str) -> str:
    """Returns the error for the deepest wrong value. If a field may have several types, all of them are listed."""
    found: dict[tuple[Any, ...], list[str]] = {}
    values: dict[tuple[Any, ...], Any] = {}
    for item in error.errors(include_url=False, include_context=False):
        if item["type"] == "missing":
            return f"{where} has no {item['loc'][-1]!r}; is it complete?"
        path = _path(item["loc"], content)
        found.setdefault(path, []).append(_MESSAGE.sub("", item["msg"], count=1))
        values[path] = item["input"]
    path = max(found, key=len)
    expected = " or ".join(dict.fromkeys(found[path]))
    return f"{where}: {place_of(path)} is {short(values[path])}, but must be {expected}."


def _path(places: Sequence[int | str], content: Any) -> tuple[Any, ...]:
    """Returns the parts of pydantic's location that are keys of the content; the others name types."""
    path: list[Any] = []
    for place in places:
        is_key = isinstance(content, Mapping) and place in content
        is_index = isinstance(content, (list, tuple)) and isinstance(place, int) and place < len(content)
        if is_key or is_index:
            path.append(place)
            content = content[place]
    return tuple(path)


def place_of(path: Sequence[Any]) -> str:
    """Formats ("blocks", "model.layers.0", "kept") as `blocks["model.layers.0"].kept`."""
    first, *others = path or ("the content",)
    pieces = [f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{short(key)}]" for key in others]
    return "".join([str(first), *pieces])
