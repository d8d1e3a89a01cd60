"""The parts of model cards that describe a FanLoRA adapter or setting."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.models.auto import modeling_auto

from ..sharing import snippets
from ..sharing.card import Part
from .modules import ModuleName, layers_by_role, ranges
from .setting_file import HEAT_MAP


if TYPE_CHECKING:
    from ..sharing.saved import SavedAdapter
    from .config import FanLoraConfig
    from .setting import FanLoraSetting

_FACTS = {
    "method": "score",
    "num_tokens": "label tokens it was averaged over",
    "num_points": "points of the path",
    "num_batches": "calibration batches",
    "strategy": "strategy",
    "keep": "kept",
    "packed": "packed projections kept together",
    "max_slowdown": "time budget, relative to the base model's step",
    "engine": "timed on",
    "predicted_slowdown": "predicted time of a step, relative to the base model's",
    "base_model_name_or_path": "scored on",
    "peft_version": "PEFT",
    "transformers_version": "transformers",
}
_PROVENANCE = (
    "Placing LoRA on all linear layers, scoring each module and keeping only the most critical modules of each layer "
    "is FanLoRA's method ([Tian et al., EMNLP 2024](https://doi.org/10.18653/v1/2024.emnlp-industry.38)); the formula "
    "of the score is that of `peft_fanlora`, since the paper's was not available."
)


def adapter_part(saved: SavedAdapter[FanLoraConfig], base: snippets.BaseModel, location: str) -> Part:
    """Returns the part of a model card that describes an adapter, and saves the heat map of its scores.

    Args:
        saved: the saved adapter.
        base: its base model.
        location: its folder or Hub id, as used in the card's code.
    """
    config = saved.config
    setting: Any = config.setting  # already converted to a FanLoraSetting by the configuration
    modules = modules_of(saved)
    of_all = f" of {len(setting.kept) + len(setting.dropped)}" if setting is not None and setting.dropped else ""
    how = "; it was not pruned" if setting is None else ", chosen by a score [1]" if setting.is_scored else ""
    size = f" It has {saved.num_parameters:,} parameters." if saved.num_parameters else ""
    pieces = [
        f"FanLoRA: LoRA with r = {config.r} and α = {config.lora_alpha:g} on {len(modules)}{of_all} linear layers{how}."
        + size,
        _code(snippets.use_adapter("FanLoRA", base, location, saved.subfolder)),
        "It requires `pip install peft-fanlora`; without importing it PEFT raises `KeyError: 'FANLORA'`. "
        "`peft-fanlora run` starts other programs that load adapters with PEFT.",
        "### Modules",
        module_table(modules, len({module.stack for module in modules}) > 1),
        *_of_setting(setting, saved.folder, saved.subfolder),
        "### Without this package",
        "If there is a folder `plain-lora` beside this adapter, it contains the same adapter as plain LoRA, for PEFT "
        "without `peft_fanlora` and for engines that serve LoRA, such as vLLM: `PeftModel.from_pretrained(base, "
        f'"{location}", subfolder="plain-lora")`. It is created with `peft_fanlora.export_lora(model, "plain-lora")`, '
        "which refuses features that plain LoRA does not have, such as DoRA.",
    ]
    if setting is not None and setting.is_scored:
        pieces.append("[1] " + _PROVENANCE)
    return Part(f"adapter {saved.name}", "FanLoRA adapter", "\n\n".join(pieces), ("fanlora", "peft-fanlora"))


def setting_part(setting: FanLoraSetting, folder: Path, location: str) -> Part:
    """Returns the part of a card for a setting that is shared without an adapter, and saves the heat map."""
    base = _base_model_of(setting.calibration.get("base_model_name_or_path"), setting.model_type)
    of_all = f" of {len(setting.kept) + len(setting.dropped)}" if setting.dropped else ""
    pieces = [
        f"A FanLoRA setting: the {len(setting.kept)}{of_all} linear layers of a model of type `{setting.model_type}` "
        "that get LoRA. It can be used for new tasks on models of the same type, including other depths.",
        _code(_use_setting(base, location)),
        "It requires `pip install peft-fanlora`.",
        "### Modules",
        module_table(setting.kept, len(setting.num_layers) > 1),
        *_of_setting(setting, folder, None),
        _PROVENANCE,
    ]
    metadata = (("library_name", "peft"), ("base_model", base.name))
    tags = ("fanlora", "fanlora-setting", "peft-fanlora")
    return Part("setting", "FanLoRA setting", "\n\n".join(pieces), tags, metadata)


def modules_of(saved: SavedAdapter[FanLoraConfig]) -> list[ModuleName]:
    """Returns the modules with LoRA in the saved file, in the order of their layers."""
    tensors = (name.partition(".lora_") for name in saved.shapes)
    return sorted({ModuleName.parse(name.removeprefix("base_model.model.")) for name, dot, _ in tensors if dot})


def module_table(modules: Iterable[ModuleName], with_stack: bool) -> str:
    """Returns a Markdown table of modules: role, number of layers, layers."""
    roles = layers_by_role(modules, with_stack=with_stack)
    rows = [f"| `{role}` | {len(layers)} | {ranges(layers)} |" for role, layers in roles.items()]
    return "\n".join(["| role | layers | which |", "|---|---:|---|", *rows])


def facts_of(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the calibration facts with readable names."""
    named = {label: calibration[key] for key, label in _FACTS.items() if calibration.get(key) not in (None, False)}
    others = {key: value for key, value in calibration.items() if key not in _FACTS}
    return {**named, **others}


def _of_setting(setting: FanLoraSetting | None, folder: Path, subfolder: str | None) -> list[str]:
    picture = folder / HEAT_MAP
    if setting is None or not setting.is_scored or find_spec("matplotlib") is None:
        picture.unlink(missing_ok=True)
        image = []
    else:
        setting.plot(picture)
        link = f"{subfolder}/{HEAT_MAP}" if subfolder else HEAT_MAP
        image = [f"![Importance of each module; a dot marks those that are kept]({link})"]
    if setting is None or not setting.calibration:
        return image
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in facts_of(setting.calibration).items()]
    return [*image, "### Calibration", "\n".join(["| | |", "|---|---|", *rows])]


def _cell(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return html.escape(" ".join(str(value).split()), quote=False).replace("|", "\\|")


def _code(text: str) -> str:
    return f"```python\n{text}\n```"


def _base_model_of(name: str | None, model_type: str | None) -> snippets.BaseModel:
    """Returns how to load a model that a setting fits.

    Args:
        name: the folder or Hub id of the scored model.
        model_type: its model type.
    """
    generative = (
        ("AutoModelForSeq2SeqLM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModel", modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        ("AutoModelForCausalLM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    )
    return snippets.BaseModel(
        name, next((loader for loader, family in generative if model_type in family), "AutoModel")
    )


def _use_setting(base: snippets.BaseModel, location: str) -> str:
    """Returns code that creates a new adapter with a setting.

    Args:
        base: a model that the setting fits.
        location: the setting's folder or Hub id.
    """
    task = next(
        (task for task, loader in snippets.TASKS.items() if loader == base.loader and loader != "AutoModel"), None
    )
    task_type = f', task_type="{task}"' if task else ""
    lines = [
        "from peft import get_peft_model",
        "from peft_fanlora import FanLoraConfig",
        base.imports,
        "",
        base.lines,
        f"model = get_peft_model(base, FanLoraConfig(setting={snippets.quoted(location)}, r=8{task_type}))",
        "model.print_trainable_parameters()",
    ]
    return snippets.code_of(lines)
