"""Model card files. The parts written by this package are updated at each save; the rest belongs to the user."""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from .writing import staged


CARD_NAME = "README.md"
_MAX_BYTES = 4 * 2**20
_END = "<!-- peft_fanlora: end -->"
_ANY_PART = re.compile("<!-- peft_fanlora: (?!end).*?" + re.escape(_END), re.DOTALL)
_INVITATION = (
    "## About\n\n"
    "*Describe what this is for, which data it was trained on and how good it is; the licence goes into the metadata. "
    "This text is yours and is kept as you write it.*"
)


@dataclass(frozen=True)
class Part:
    """The part of a model card that describes one object.

    Attributes:
        subject: the object, such as "adapter default"; a later save finds its part by the subject.
        title: the heading of the card, if this is its first part.
        text: the Markdown.
        tags: the Hub tags.
        metadata: metadata of the card, added where it has no value yet.
    """

    subject: str
    title: str
    text: str
    tags: tuple[str, ...]
    metadata: tuple[tuple[str, Any], ...] = ()


def tags_in(folder: Path) -> list[str]:
    """Returns the tags of a folder's card; none if there is no card.

    Raises:
        ValueError: the card's metadata cannot be read.
    """
    return _tags(_read(folder))


def has_part(folder: Path, subject: str) -> bool:
    """Returns whether a folder's card has a part whose subject starts with `subject`."""
    return _begin(subject, closed=False) in _read(folder).text


def bring(folder: Path, other: Path) -> None:
    """Copies a folder's card, if it has one, into another folder."""
    if (folder / CARD_NAME).exists():
        shutil.copyfile(folder / CARD_NAME, other / CARD_NAME)


def add_tags(folder: Path, tags: Iterable[str]) -> None:
    """Adds tags to a folder's card."""
    card = _read(folder)
    card.data["tags"] = list(dict.fromkeys([*_tags(card), *tags]))
    _save(card, folder)


def write(folder: Path, part: Part, *, is_new: bool, tags: Iterable[str] = ()) -> None:
    """Writes a part into a folder's card, replacing its last version if there is one.

    Args:
        folder: the folder of the card; PEFT may have written one there in the same save.
        part: the part.
        is_new: whether there was no card before this save. PEFT's template is then replaced, except for the versions.
        tags: tags to keep in addition to the part's, since PEFT drops tags that the user has added.
    """
    card = _read(folder)
    for key, value in part.metadata:
        if value and not card.data.get(key):
            card.data[key] = value
    card.data["tags"] = list(dict.fromkeys([*tags, *_tags(card), *part.tags]))
    _forget_local_base_model(card)
    text = part.text.strip().replace("<!--", "&lt;!--")  # the text must not contain an end marker
    mine = f"{_begin(part.subject)}\n\n{text}\n\n{_END}"
    parts = list(_ANY_PART.finditer(card.text))
    earlier = next((found for found in parts if found.group().startswith(_begin(part.subject))), None)
    if is_new:
        _, heading, versions = card.text.partition("### Framework versions")
        pieces = [f"# {part.title}", mine, _INVITATION, heading + versions]
        card.text = "\n" + "\n\n".join(piece.strip() for piece in pieces if piece)
    elif earlier is not None:
        card.text = card.text[: earlier.start()] + mine + card.text[earlier.end() :]
    elif parts:
        card.text = f"{card.text[: parts[-1].end()]}\n\n{mine}{card.text[parts[-1].end() :]}"
    else:
        card.text = f"{card.text.rstrip()}\n\n{mine}"
    card.text = card.text.rstrip() + "\n"  # PEFT strips the newline each time
    _save(card, folder)


def _begin(subject: str, closed: bool = True) -> str:
    start = f"<!-- peft_fanlora: {subject}"
    return (
        f"{start}. Each save rewrites this, down to the next such line; your own text goes outside. -->"
        if closed
        else start
    )


def _read(folder: Path) -> ModelCard:
    file = folder / CARD_NAME
    if not file.exists():
        return ModelCard("---\n{}\n---\n")
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise ValueError(f"{file} has {size:,} bytes, more than the {_MAX_BYTES:,} of a card: move it away.")
    try:
        card = ModelCard(file.read_text(encoding="utf-8"))
        _tags(card)
    except OSError:
        raise
    except Exception as error:  # errors of YAML and huggingface_hub for invalid metadata
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"{file} has metadata that cannot be read: {reason}. Correct the text between its two lines '---'."
        ) from error
    return card


def _save(card: ModelCard, folder: Path) -> None:
    with staged(folder) as stage:
        card.save(stage / CARD_NAME)


def _tags(card: ModelCard) -> list[str]:
    tags = card.data.get("tags") or []
    if isinstance(tags, str):
        return [tags]
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        raise ValueError(f"tags is {str(tags)[:60]!r}, but must be a list of words")
    return tags


def _forget_local_base_model(card: ModelCard) -> None:
    """Removes a local or empty base model from the metadata, where the Hub only accepts repository ids."""
    base = card.data.get("base_model")
    if isinstance(base, str) and (not base or os.path.isdir(base)):
        card.data["base_model"] = None
        card.data["tags"] = [tag for tag in _tags(card) if tag != f"base_model:adapter:{base}"]
