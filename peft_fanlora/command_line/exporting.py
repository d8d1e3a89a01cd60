"""The command `export`: saves a FanLoRA adapter as plain LoRA."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from ..fanlora.config import FanLoraConfig
from ..fanlora.export import export_lora
from ..fanlora.setting import FanLoraSetting
from ..sharing.saved import SavedAdapter
from ..sharing.snippets import TASKS
from . import sources
from .output import quiet_stdout, show_facts, show_json


def export(where: str, output: Path, as_json: bool) -> None:
    """Exports an adapter. The weights of the base model are not loaded.

    Raises:
        ValueError: there is no FanLoRA adapter, its base model is unknown, or it has features beyond plain LoRA.
    """
    found = sources.adapter_or_setting(where)
    if isinstance(found, FanLoraSetting) or not isinstance(found.config, FanLoraConfig):
        what = "a setting, which has no weights" if isinstance(found, FanLoraSetting) else "a PARA adapter"
        raise ValueError(f"{where} is {what}; only FanLoRA adapters can be exported as plain LoRA.")
    if output.is_file():
        raise ValueError(f"{output} is a file; pass the folder to write.")
    with quiet_stdout():
        model = PeftModel.from_pretrained(_bare(found), str(found.folder), low_cpu_mem_usage=True)
        export_lora(model, output)
    written = SavedAdapter(found.config, output)
    content = {"output": str(output), "parameters": written.num_parameters, "bytes": written.num_bytes}
    if as_json:
        show_json(content)
    else:
        show_facts(f"{where} as plain LoRA", content)


def _bare(adapter: SavedAdapter[FanLoraConfig]) -> Any:
    """Returns the base model with uninitialised weights that are never written, and so take no memory."""
    config = adapter.config
    if not config.base_model_name_or_path:
        raise ValueError(
            "The adapter does not name its base model: set base_model_name_or_path in adapter_config.json."
        )
    if config.task_type in TASKS:
        loader = getattr(transformers, TASKS[config.task_type])
    else:
        loader = getattr(transformers, (config.auto_mapping or {}).get("base_model_class", "AutoModel"))
    model_config = sources.model_config(config.base_model_name_or_path)
    with torch.device("meta"):
        base = loader.from_config(model_config) if hasattr(loader, "from_config") else loader(model_config)
    return base.to_empty(device="cpu")
