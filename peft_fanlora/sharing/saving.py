"""Adds model cards to `save_pretrained` and `push_to_hub`.

PEFT writes a card that does not know our methods, and `push_to_hub`, inherited from transformers, replaces it by
another one. Neither has a hook, so importing this package wraps these two methods of `PeftModel`. Models without an
adapter of a method that has a card are not affected.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME

from .writing import staged


if TYPE_CHECKING:
    from .card import Part


_CARDS: dict[type, Callable[..., Part] | str] = {}


def add_card(shared: type, card: Callable[..., Part] | str) -> None:
    """Registers the function that describes objects of a class, and of its subclasses, in model cards.

    Args:
        shared: the class.
        card: returns the part of a card. For a configuration it gets the `SavedAdapter`, its `BaseModel` and its
            folder or Hub id, as used in the card's code; for other objects it gets the object, its folder and that
            name. A string such as "package.module:function" is imported at first use.
    """
    _CARDS[shared] = card


def _card_of(shared: type) -> Callable[..., Part] | None:
    """Returns the function that describes objects of a class; None if there is none."""
    found = next((_CARDS[base] for base in shared.__mro__ if base in _CARDS), None)
    return resolve_name(found) if isinstance(found, str) else found


def save_with_card(shared: Any, folder: Path, location: str) -> None:
    """Saves an object other than an adapter, with a card unless the folder is that of an adapter.

    Args:
        shared: the object, with a method `write(folder)` and an attribute `own_files`, the files that its card may
            add.
        folder: the folder.
        location: its folder or Hub id, as used in the card's code.
    """
    from . import card

    describe = _card_of(type(shared))
    if describe is None or (folder / CONFIG_NAME).exists() or card.has_part(folder, "adapter "):
        shared.write(folder)
        return
    is_new = not (folder / card.CARD_NAME).exists()
    with staged(folder, shared.own_files) as stage:
        card.bring(folder, stage)
        shared.write(stage)
        card.write(stage, describe(shared, stage, location), is_new=is_new)


def write_cards() -> None:
    """Wraps `PeftModel`, so that our adapters are saved and uploaded with a card; repeated calls have no effect."""
    wrapped: Any = PeftModel
    if not hasattr(wrapped.save_pretrained, "writes_cards"):
        wrapped.save_pretrained = _saving(wrapped.save_pretrained)
        wrapped.push_to_hub = _pushing(wrapped.push_to_hub)


def _saving(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def save_with_card(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        location = kwargs.pop("shared_as", None)
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        folder = Path(call.arguments["save_directory"])
        names = _ours(self, call.arguments["selected_adapters"])
        if not names or not call.arguments["is_main_process"] or folder.is_file():
            save_pretrained(self, *args, **kwargs)
            return
        from . import card

        tags, is_new = card.tags_in(folder), not (folder / card.CARD_NAME).exists()
        with staged(folder, _own_files(self, names)) as stage:
            card.bring(folder, stage)
            call.arguments["save_directory"] = str(stage)
            save_pretrained(*call.args, **call.kwargs)
            for name in names:
                part = _part(self, name, stage, location or folder.resolve().name)
                card.write(stage, part, is_new=is_new, tags=tags)
                is_new = False

    save_with_card.writes_cards = True  # type: ignore[attr-defined]
    return save_with_card


def _pushing(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(push_to_hub)
    def push_with_card(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if not _ours(self, None):
            return push_to_hub(self, repo_id, **options)
        from . import card, hub

        tags = options.pop("tags", None) or ()
        options.pop("max_shard_size", None)  # only for whole models; adapters are one file
        options["commit_message"] = options.get("commit_message") or "Upload model"

        def save(folder: Path, repo_id: str) -> None:
            self.save_pretrained(str(folder), shared_as=repo_id)
            card.add_tags(folder, tags)

        return hub.push(save, repo_id, **options)

    return push_with_card


def _ours(model: PeftModel, selected: Iterable[str] | None) -> list[str]:
    """Returns the names of the adapters to save that have a card of ours, "default" first."""
    configs = model.peft_config
    names = configs if selected is None else selected
    types: Any = {name: configs[name].peft_type for name in names if name in configs}
    ours = [name for name, peft_type in types.items() if _card_of(PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type, object))]
    return sorted(ours, key=lambda name: name != "default")


def _own_files(model: PeftModel, names: Iterable[str]) -> list[str]:
    """Returns the names of files from earlier saves that are removed unless this save writes them."""
    return [
        str(_folder_of(name, Path()) / file)
        for name in names
        for file in getattr(model.peft_config[name], "own_files", ())
    ]


def _folder_of(name: str, folder: Path) -> Path:
    """Returns the folder in which PEFT saves an adapter."""
    return folder if name == "default" else folder / name


def _part(model: PeftModel, name: str, folder: Path, location: str) -> Part:
    from .saved import SavedAdapter
    from .snippets import base_model_of

    own_folder = _folder_of(name, folder)
    config: Any = type(model.peft_config[name]).from_pretrained(str(own_folder))  # PEFT may have converted it
    describe: Any = _card_of(type(config))
    return describe(SavedAdapter(config, own_folder, name), base_model_of(model.get_base_model(), config), location)
