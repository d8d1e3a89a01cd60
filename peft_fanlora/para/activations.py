"""The generator's activations by the names that `ParaConfig` takes."""

from __future__ import annotations

from torch import nn
from transformers.activations import ACT2FN

from .core.generator import RationalActivation


RATIONAL = "rational"


def is_activation(name: str) -> bool:
    """Whether there is an activation of this name: `RATIONAL` or one of transformers' ACT2FN."""
    return name == RATIONAL or name in ACT2FN


def make_activation(name: str) -> nn.Module:
    """Returns a new activation of this name."""
    return RationalActivation() if name == RATIONAL else ACT2FN[name]
