"""Importing the package makes both methods known to PEFT, once, in any order, and says so if it can't."""

import copy
import pickle

import pytest
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import peft_fanlora
from integration_tests.helpers.processes import run_new_python
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


def test_vllm_does_not_import_peft() -> None:
    """In a process of vLLM, the plugin does not import PEFT. The first use of a method does, and registers both."""
    code = """
import sys, types
sys.modules["vllm"] = types.ModuleType("vllm")
import peft_fanlora.vllm_plugin, peft_fanlora.para.activations, peft_fanlora.para.targets, peft_fanlora.sharing.reading
from peft_fanlora.para.core import generator, scaling
assert not {"peft", "transformers.trainer"} & set(sys.modules)
assert "load_tenant" in dir(peft_fanlora)
assert peft_fanlora.load_tenant
assert {"FANLORA", "PARA"} <= set(sys.modules["peft"].PEFT_TYPE_TO_CONFIG_MAPPING)
assert hasattr(sys.modules["peft"].PeftModel.save_pretrained, "writes_cards")
"""
    run_new_python("-c", code)


def test_public_names() -> None:
    assert all(hasattr(peft_fanlora, name) for name in peft_fanlora.__all__)
    assert set(peft_fanlora.__all__) <= set(dir(peft_fanlora))
    with pytest.raises(AttributeError, match="no attribute 'FanLoraCalback'"):
        peft_fanlora.FanLoraCalback  # noqa: B018


def test_the_import_is_light() -> None:
    """With the trainer of transformers, `import peft_fanlora` adds 500 modules and two seconds to `import peft`."""
    code = """
import sys
import peft
before = set(sys.modules)
import peft_fanlora
added = sorted(set(sys.modules) - before)
assert len(added) <= 40, added
assert not {"datasets", "pandas", "pydantic", "transformers.trainer"} & set(added)

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel
assert {"FANLORA", "PARA"} <= {str(name.value) for name in PEFT_TYPE_TO_CONFIG_MAPPING}
assert {"save_pretrained", "push_to_hub", "load_adapter"} == {
    name for name in dir(PeftModel) if hasattr(getattr(PeftModel, name), "__wrapped__")
    and getattr(PeftModel, name).__code__.co_filename.startswith(peft_fanlora.__path__[0])
}
from peft_fanlora import *
assert FanLoraCallback.__module__ == "peft_fanlora.fanlora.callback"
"""
    run_new_python("-c", code)
