"""Lets PEFT's test helpers work without the Hub."""

import collections
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from PIL import Image


class _AlwaysKnown(collections.defaultdict[str, int]):
    """Makes `hub_online_once` believe that every model is cached already."""

    def __contains__(self, key: object) -> bool:
        return True


def cat_image() -> Image.Image:
    """Returns an image in which there is no cat."""
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def english_quotes() -> Any:
    """Returns a few rows with a column "quote"."""
    quotes = [f"To be or not to be, that is question {number}." for number in range(32)]
    return DatasetDict({"train": Dataset.from_dict({"quote": quotes})})


@lru_cache
def prepare(method: str) -> None:
    """Replaces what the helper module fetches from the Hub, and lets it know how PARA is made to change an output."""
    utilities = import_module("tests.testing_utils")
    utilities._HUB_MODEL_ACCESSES = _AlwaysKnown(int)
    utilities.load_cat_image = cat_image
    utilities.load_dataset_english_quotes = english_quotes
    if method == "PARA":
        utilities.set_init_weights_false = lambda _, options: {**options, "init_para_weights": False}
    import_module("tests.testing_common")
