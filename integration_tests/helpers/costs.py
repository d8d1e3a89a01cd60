"""Costs and scores of the modules of tiny models."""

import random
from typing import Any

from integration_tests.helpers.models import tiny
from peft_fanlora import ImportanceScores, ModuleCosts
from peft_fanlora.fanlora.candidates import candidates


PER_STEP, PER_MODULE, PER_PARAMETER = 5e-3, 4e-3, 2e-5
ABOUT: dict[str, Any] = {
    "method": "path",
    "num_tokens": 1,
    "num_layers": {"model.layers": 3},
    "model_type": "llama",
    "calibration": {},
}
"""What `ImportanceScores` of the tiny model say beside their values."""


def costs(engine: Any = "transformers", model: str = "llama") -> ModuleCosts:
    base = tiny(model)
    parameters = {name: 8 * (layer.in_features + layer.out_features) for name, layer in candidates(base).items()}
    return ModuleCosts(engine, PER_STEP, PER_MODULE, PER_PARAMETER, parameters, error=0.01)


def scores(seed: int = 0) -> ImportanceScores:
    chance = random.Random(seed)
    values = {name: chance.gauss(0.5, 1.0) for name in costs().parameters}
    return ImportanceScores(values, **ABOUT)
