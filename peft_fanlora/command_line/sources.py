"""Loads the inputs of the commands: adapters, settings, models and data sets, each from a path or a Hub id."""

from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from ..fanlora.config import FanLoraConfig
from ..fanlora.setting import FanLoraSetting
from ..para.config import ParaConfig
from ..sharing.reading import short
from ..sharing.saved import SavedAdapter


FILE_KINDS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


def adapter_or_setting(where: str) -> SavedAdapter[Any] | FanLoraSetting:
    """Returns the adapter at a path or Hub id, else the setting.

    Raises:
        ValueError: there is neither, an adapter of another method, or a file with invalid content.
    """
    folder = _adapter_folder(where)
    if folder is None:
        return _setting(where)
    content = FanLoraConfig.from_json_file(str(folder / CONFIG_NAME))
    peft_type = content.get("peft_type")
    if peft_type not in ("FANLORA", "PARA"):
        raise ValueError(
            f"{where} is an adapter of type {short(peft_type)}, according to its {CONFIG_NAME}: use a FanLoRA or PARA "
            "adapter."
        )
    config: Any = FanLoraConfig if peft_type == "FANLORA" else ParaConfig
    try:
        return SavedAdapter(config.from_peft_type(**content), folder)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error


def adapter_config(where: str) -> FanLoraConfig:
    """Returns the configuration for scoring a LoRA or FanLoRA adapter.

    Raises:
        ValueError: there is no such adapter, or its configuration has invalid content.
    """
    folder = _adapter_folder(where)
    if folder is None:
        raise ValueError(
            f"There is no adapter at {where!r}: it is neither a folder with a {CONFIG_NAME} nor a readable Hub "
            "repository. For a private repository, log in with `hf auth login`."
        )
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_NAME}: {error}") from error
    return config if isinstance(config, FanLoraConfig) else FanLoraConfig.from_lora(config)


def _adapter_folder(where: str) -> Path | None:
    """Returns the folder of the adapter at a path or Hub id, after a download if needed; None if there is none."""
    folder = Path(where)
    if not folder.is_dir():
        try:
            file = hf_hub_download(where, CONFIG_NAME)
            hf_hub_download(where, SAFETENSORS_WEIGHTS_NAME)
        except (EntryNotFoundError, HFValidationError, HTTPError, OSError):
            return None
        return Path(file).parent
    return folder if (folder / CONFIG_NAME).exists() else None


def base_model_of(adapter: str) -> str:
    """Returns the base model in an adapter's configuration.

    Raises:
        ValueError: there is no adapter, or it has no base model.
    """
    base = adapter_config(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not name its base model: pass the model before the data set.")
    return base


def setting(where: str) -> FanLoraSetting:
    """Returns the setting at a path or Hub id, which may be in an adapter.

    Raises:
        ValueError: there is none.
    """
    found = adapter_or_setting(where)
    if isinstance(found, FanLoraSetting):
        return found
    if getattr(found.config, "setting", None) is None:
        raise ValueError(f"{where} is an adapter without a FanLoRA setting: it was never pruned.")
    return found.config.setting


def _setting(where: str) -> FanLoraSetting:
    try:
        return FanLoraSetting.from_pretrained(where)
    except FileNotFoundError as error:
        raise ValueError(
            f"There is no FanLoRA or PARA adapter and no FanLoRA setting at {where!r}: it is neither a folder with "
            "one nor a readable Hub repository. For a private repository, log in with `hf auth login`."
        ) from error


def model_config(where: str) -> Any:
    """Returns a model's configuration.

    Raises:
        ValueError: there is no model.
    """
    try:
        return AutoConfig.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"There is no model at {where!r}: it is neither a folder with a config.json that transformers knows nor a "
            "readable Hub repository. For a private repository, log in with `hf auth login`."
        ) from error


def causal_model(where: str) -> Any:
    """Returns a language model with its weights.

    Raises:
        ValueError: there is no such model.
    """
    model_config(where)
    return AutoModelForCausalLM.from_pretrained(where)


def tokenizer(where: str) -> Any:
    """Returns a model's tokenizer.

    Raises:
        ValueError: it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError) as error:
        raise ValueError(f"The model {where!r} has no tokenizer; save one in its folder.") from error


def dataset(where: str, split: str, name: str | None, rows: int | None) -> Any:
    """Returns a data set.

    Args:
        where: a file (.jsonl, .json, .csv, .parquet, .txt with one example per line), a folder, or a Hub id.
        split: the split.
        name: the configuration of a data set that has several.
        rows: how many of the first rows to use; None for all.

    Raises:
        ValueError: there is no such data set.
    """
    import datasets

    file = Path(where)
    try:
        if file.is_file():
            if file.suffix not in FILE_KINDS:
                raise ValueError(f"files end in {', '.join(FILE_KINDS)}")
            data = datasets.load_dataset(FILE_KINDS[file.suffix], data_files=where, split="train")
        elif (file / "state.json").exists():  # saved by `Dataset.save_to_disk`
            data = datasets.load_from_disk(where)
        else:
            data = datasets.load_dataset(where, name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"There is no readable data set at {where!r}: {reason}") from error
    return data if rows is None else data.select(range(min(rows, len(data))))
