"""Calibration batches for a training run, prepared like the trainer's own data."""

import inspect
from collections.abc import Iterable
from itertools import islice
from typing import Any

from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import DataLoader
from transformers import Trainer


def calibration_batches(data: Any, trainer: Trainer) -> Iterable[Any]:
    """Returns the batches that this process scores. In a distributed run each process gets a part of the data."""
    loader = _loader(data, trainer)
    if loader is not data or isinstance(data, DataLoaderAdapter):  # already sharded by accelerate
        return loader
    return islice(loader, trainer.args.process_index, None, trainer.args.world_size)


def check_calibration_data(data: Any, trainer: Trainer) -> None:
    """Checks the first batch of the calibration data, so that errors are found before training starts.

    Raises:
        ValueError: there is no data, it is empty, or its batches have no labels.
    """
    if data is None:
        raise ValueError(
            "FanLoraCallback has no calibration data to score on: pass `calibration_dataset`. (A trainer with "
            "restore_callback_states_from_checkpoint=True cannot restore it.)"
        )
    loader: Any = _loader(data, trainer)
    row = next(iter(loader.dataset), None)
    if row is None:
        raise ValueError(
            "The calibration data of FanLoraCallback is empty, or became empty when the trainer prepared it: pass a "
            "`calibration_dataset` with a few hundred rows."
        )
    batch = loader.collate_fn(row if loader.batch_sampler is None else [row])
    labels = batch.get("labels") if hasattr(batch, "get") else None
    if labels is None:
        has = f"only {sorted(batch)}" if hasattr(batch, "keys") else f"but is a {type(batch).__name__}"
        raise ValueError(
            "FanLoraCallback scores modules by the loss on labels, but a calibration batch of "
            f"{type(trainer).__name__} has no `labels`, {has}. Pass a DataLoader whose batches have `labels`, such as "
            "DataLoader(tokenized_rows, batch_size=8, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)), "
            'or use method="weight_norm", which needs no data.'
        )


def _loader(data: Any, trainer: Trainer) -> DataLoader:
    """Returns a loader of the calibration data: `data` itself if it is a loader, else one made by the trainer.

    Rows are not repeated to give each process as many batches, since they would count twice in the scores.
    """
    if isinstance(data, DataLoader):
        return data
    accelerator = trainer.accelerator
    even_batches = accelerator.even_batches
    try:
        accelerator.even_batches = False
        return trainer.get_test_dataloader(_prepared(data, trainer))
    finally:
        accelerator.even_batches = even_batches


def _prepared(dataset: Any, trainer: Trainer) -> Any:
    """Tokenises the dataset like the training data, if the trainer is one of TRL's that accept text."""
    prepare = getattr(trainer, "_prepare_dataset", None)
    if prepare is None or getattr(trainer, "_skip_prepare_dataset", False) or not hasattr(dataset, "column_names"):
        return dataset
    arguments = {
        "dataset": dataset,
        "processing_class": trainer.processing_class,
        "args": trainer.args,
        "packing": False,
        "formatting_func": getattr(trainer, "_formatting_func", None),
        "dataset_name": "calibration",
    }
    return prepare(**{name: arguments[name] for name in inspect.signature(prepare).parameters})
