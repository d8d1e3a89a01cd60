"""The activations of the vector generator, by the names that `ParaConfig` takes."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from .core.generator import RationalActivation


RATIONAL = "rational"


def is_activation(name: str) -> bool:
    """Returns whether the name is `RATIONAL` or a key of transformers' ACT2FN."""
    return name == RATIONAL or name in ACT2FN


def make_activation(name: str) -> nn.Module:
    """Returns a new activation module by its name."""
    return RationalActivation() if name == RATIONAL else ACT2FN[name]
