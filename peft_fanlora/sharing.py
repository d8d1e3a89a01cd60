"""Saving and sharing with a card: what this package adds to `save_pretrained` and `push_to_hub`.

PEFT writes a card that does not know our methods, and `push_to_hub`, which it has from transformers, puts another one in
its place. Neither offers a hook, so importing this package wraps these two methods of `PeftModel`. Models without a
FanLoRA or PARA adapter pass through as they do in PEFT.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel

from . import hub
from .cards import card, fanlora, para, snippets
from .fanlora.config import FanLoraConfig
from .saved import SavedAdapter


def write_cards() -> None:
    """Lets `PeftModel` save and upload our adapters with a card; to do so again does nothing."""
    wrapped: Any = PeftModel
    if not hasattr(wrapped.save_pretrained, "writes_cards"):
        wrapped.save_pretrained = _saving(wrapped.save_pretrained)
        wrapped.push_to_hub = _pushing(wrapped.push_to_hub)


def _saving(save_pretrained: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(save_pretrained)

    @functools.wraps(save_pretrained)
    def save_with_card(self: PeftModel, *args: Any, **kwargs: Any) -> None:
        call = signature.bind(self, *args, **kwargs)
        call.apply_defaults()
        folder, location = Path(call.arguments["save_directory"]), kwargs.pop("shared_as", None)
        names = _ours(self, call.arguments["selected_adapters"])
        if not names or not call.arguments["is_main_process"]:
            save_pretrained(self, *args, **kwargs)
            return
        tags, is_new = card.tags_in(folder), not (folder / card.CARD_NAME).exists()
        save_pretrained(self, *args, **kwargs)
        for name in names:
            part = _part(self, name, folder, location or folder.resolve().name)
            card.write(folder, part, is_new=is_new, tags=tags)
            is_new = False

    save_with_card.writes_cards = True  # type: ignore[attr-defined]
    return save_with_card


def _pushing(push_to_hub: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(push_to_hub)
    def push_with_card(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if not _ours(self, None):
            return push_to_hub(self, repo_id, **options)
        tags = options.pop("tags", None) or ()
        options.pop("max_shard_size", None)  # of whole models; adapters are one file
        options["commit_message"] = options.get("commit_message") or "Upload model"

        def save(folder: Path, repo_id: str) -> None:
            self.save_pretrained(str(folder), shared_as=repo_id)
            card.add_tags(folder, tags)

        return hub.push(save, repo_id, **options)

    return push_with_card


def _ours(model: PeftModel, selected: Iterable[str] | None) -> list[str]:
    """Returns the names of those adapters that are to be saved and are FanLoRA's or PARA's, "default" first."""
    configs = model.peft_config
    names = configs if selected is None else selected
    ours = [name for name in names if name in configs and configs[name].peft_type in ("FANLORA", "PARA")]
    return sorted(ours, key=lambda name: name != "default")


def _part(model: PeftModel, name: str, folder: Path, location: str) -> card.Part:
    own_folder = folder if name == "default" else folder / name
    config: Any = type(model.peft_config[name]).from_pretrained(str(own_folder))  # PEFT may have saved it converted
    base = snippets.base_model_of(model.get_base_model(), config)
    if isinstance(config, FanLoraConfig):
        return fanlora.adapter_part(SavedAdapter(config, own_folder, name), base, location)
    return para.adapter_part(SavedAdapter(config, own_folder, name), base, location)
