"""Importing the package makes both methods known to PEFT, once, in any order, and says so if it can't."""

import copy
import pickle
import subprocess
import sys

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_fanlora
from peft_fanlora import FanLoraConfig, FanLoraModel
from peft_fanlora.registration import add_peft_type, register


def test_peft_knows_the_type() -> None:
    member = PeftType["FANLORA"]
    assert member in list(PeftType)
    assert member == "FANLORA"
    assert PeftType("FANLORA") is member
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING[member] is FanLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is FanLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "lora_"


def test_registering_twice_changes_nothing() -> None:
    before = dict(PEFT_TYPE_TO_CONFIG_MAPPING)
    register(name="fanlora", config_cls=FanLoraConfig, model_cls=FanLoraModel)
    assert add_peft_type("FANLORA") is PeftType["FANLORA"]
    assert before == PEFT_TYPE_TO_CONFIG_MAPPING


def test_a_clash_names_both_sides() -> None:
    class ForeignConfig(LoraConfig):
        pass

    with pytest.raises(RuntimeError) as error:
        register(name="fanlora", config_cls=ForeignConfig, model_cls=FanLoraModel)
    assert "peft_fanlora.fanlora.config.FanLoraConfig" in str(error.value)
    assert "ForeignConfig" in str(error.value)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType["FANLORA"]] is FanLoraConfig


@pytest.mark.parametrize(
    "first", ["import peft, peft_fanlora", "import peft_fanlora, peft"], ids=["peft first", "peft second"]
)
def test_the_order_of_imports_does_not_matter(first: str) -> None:
    code = f"{first}; print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['FANLORA'].__name__)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "FanLoraConfig"


def test_public_names() -> None:
    assert all(hasattr(peft_fanlora, name) for name in peft_fanlora.__all__)
