"""What earlier versions have saved loads, and computes what it did."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from integration_tests.compatibility.earlier import EARLIER, PARA, base, logits
from peft_fanlora import FanLoraConfig, FanLoraModel, FanLoraSetting, ModuleCosts, ParaModel, load_tenant


VERSIONS = sorted(EARLIER.iterdir())
KINDS = ["fanlora", "fanlora-pruned", "fanlora-classifier", "plain-lora", *(f"para-{pooling}" for pooling in PARA)]
each_version = pytest.mark.parametrize("version", VERSIONS, ids=lambda folder: folder.name)
each_kind = pytest.mark.parametrize("kind", KINDS)


def check(model: PeftModel, version: Path, kind: str) -> None:
    torch.testing.assert_close(logits(model), load_file(version / "logits.safetensors")[kind], atol=1e-5, rtol=1e-5)


def test_there_is_something_to_load() -> None:
    assert VERSIONS[0].name == "0.1.0"


@each_version
@each_kind
def test_an_adapter_computes_what_it_did(version: Path, kind: str, tmp_path: Path) -> None:
    model = PeftModel.from_pretrained(base(kind), version / kind)
    assert isinstance(model.base_model, ParaModel if "para" in kind else FanLoraModel) or kind == "plain-lora"
    check(model, version, kind)
    with torch.no_grad(), model.disable_adapter():
        assert (logits(model) - load_file(version / "logits.safetensors")[kind]).abs().max() > 0.01
    shutil.copytree(version / kind, tmp_path / kind)
    model.save_pretrained(tmp_path / kind)
    check(PeftModel.from_pretrained(base(kind), tmp_path / kind), version, kind)


@each_version
@pytest.mark.parametrize(
    "host, guest", [("fanlora", "fanlora-pruned"), ("fanlora", "plain-lora"), ("para-max", "para-mean")]
)
def test_an_adapter_is_a_tenant_beside_another(version: Path, host: str, guest: str) -> None:
    model = PeftModel.from_pretrained(base(host), version / host)
    load_tenant(model, version / guest, "guest")
    check(model, version, host)
    model.set_adapter("guest")
    check(model, version, guest)


@each_version
def test_a_setting_and_costs_say_what_they_did(version: Path) -> None:
    facts: dict[str, Any] = json.loads((version / "facts.json").read_text())
    setting = FanLoraSetting.from_pretrained(version / "setting")
    assert setting.names == facts["kept"] and setting.to_dict()["blocks"] == facts["blocks"]
    assert FanLoraSetting.from_pretrained(version / "fanlora-pruned") == setting
    model = get_peft_model(base("fanlora"), FanLoraConfig(setting=version / "setting", r=2, task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == set(setting.names)
    assert ModuleCosts.load(version / "costs.json").slowdown(setting.names) == pytest.approx(facts["slowdown"])


def with_later_fields(file: Path, folder: Path) -> Path:
    """Copies a file, or the folder of an adapter, with a field that no version knows."""
    copy = Path(shutil.copytree(file.parent, folder / file.parent.name)) / file.name
    content = json.loads(copy.read_text())
    if isinstance(content.get("setting"), dict):
        content["setting"]["colour_of_the_setting"] = "red"
    copy.write_text(json.dumps({**content, "colour": "blue"}))
    return copy


@each_kind
def test_later_fields_of_an_adapter_are_ignored_with_a_warning(kind: str, tmp_path: Path) -> None:
    version = VERSIONS[-1]
    folder = with_later_fields(version / kind / "adapter_config.json", tmp_path).parent
    with pytest.warns(UserWarning) as caught:
        check(PeftModel.from_pretrained(base(kind), folder), version, kind)
    messages = " ".join(str(warning.message) for warning in caught)
    assert "'colour'" in messages and ("colour_of_the_setting" in messages) == (kind == "fanlora-pruned")


def test_later_fields_of_costs_are_ignored_with_a_warning(tmp_path: Path) -> None:
    (tmp_path / "version").mkdir()
    shutil.copy(VERSIONS[-1] / "costs.json", tmp_path / "version")
    later = with_later_fields(tmp_path / "version" / "costs.json", tmp_path / "later")
    with pytest.warns(UserWarning, match=r"later.*does not know and ignores: \['colour'\]") as caught:
        assert ModuleCosts.load(later) == ModuleCosts.load(VERSIONS[-1] / "costs.json")
    assert caught[0].filename == __file__


def test_an_exported_adapter_needs_no_class_of_this_package() -> None:
    model = PeftModel.from_pretrained(base("plain-lora"), VERSIONS[-1] / "plain-lora")
    assert type(model.peft_config["default"]) is LoraConfig
