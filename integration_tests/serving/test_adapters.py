"""An adapter's name that is also the name of a part of the model is refused, and nothing has changed then."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file

from integration_tests.helpers.models import TINY, fanlora
from peft_fanlora import FanLoraConfig, ParaConfig, load_tenant


both = pytest.mark.parametrize("config", [FanLoraConfig, ParaConfig], ids=["FanLoRA", "PARA"])
PARTS = ["mlp", "layers", "q_proj", "0", "model", "weight", "base_layer", "a.b", "layers.0", ""]


def snapshot(model: Any) -> tuple[Any, ...]:
    modules = [(name, type(module)) for name, module in model.named_modules()]
    flags = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return modules, flags, list(getattr(model, "peft_config", {}))


@both
@pytest.mark.parametrize("name", PARTS)
def test_names_of_parts_are_refused_wherever_an_adapter_is_added(config: Any, name: str, tmp_path: Path) -> None:
    model = get_peft_model(TINY["llama"].base(), config(r=2))
    model.save_pretrained(tmp_path)
    before = snapshot(model)
    plain = TINY["llama"].base()
    bare = snapshot(plain)
    ways = {
        "add_adapter": lambda: model.add_adapter(name, config(r=2)),
        "load_adapter": lambda: model.load_adapter(tmp_path, name),
        "load_tenant": lambda: load_tenant(model, tmp_path, name),
        "get_peft_model": lambda: get_peft_model(plain, config(r=2), adapter_name=name),
        "from_pretrained": lambda: PeftModel.from_pretrained(plain, tmp_path, adapter_name=name),
        "inject_adapter_in_model": lambda: inject_adapter_in_model(config(r=2), plain, name),
        "transformers' load_adapter": lambda: plain.load_adapter(str(tmp_path), adapter_name=name),
    }
    if name:  # transformers takes no name for "default"
        ways["transformers' add_adapter"] = lambda: plain.add_adapter(config(r=2), name)
    else:
        del ways["transformers' load_adapter"]
    if name in ("mlp", "layers", "q_proj", "0"):  # nothing is mixed up where there is no other adapter
        for way in ("get_peft_model", "from_pretrained", "inject_adapter_in_model", "transformers' add_adapter"):
            del ways[way]
        del ways["transformers' load_adapter"]
    if config is FanLoraConfig:
        ways["add_weighted_adapter"] = lambda: model.add_weighted_adapter(["default"], [1.0], name)
    for way, add in ways.items():
        with pytest.raises(ValueError, match=r"is also the name of a part of this model|contains a dot"):
            add()
        assert snapshot(model) == before, way
        assert snapshot(plain) == bare, way
    plain.add_adapter(config(r=2), "fine")
    with pytest.raises(ValueError, match=r"is also the name of a part of this model|contains a dot"):
        plain.add_adapter(config(r=2), name or "a.b")
    assert list(plain.peft_config) == ["fine"]
    plain.add_adapter(config(r=2), "fine too")


@both
def test_a_name_that_leads_out_of_the_folder_is_refused(config: Any, tmp_path: Path) -> None:
    """PEFT saves an adapter in a folder of its name: an absolute path would replace the folder that is passed."""
    model = get_peft_model(TINY["llama"].base(), config(r=2))
    before = snapshot(model)
    for name in (f"/{tmp_path.name}/elsewhere", "C:\\elsewhere", "\\elsewhere"):
        with pytest.raises(ValueError, match="is a path, and the adapter would be saved there"):
            model.add_adapter(name, config(r=2))
    assert snapshot(model) == before
    model.add_adapter("customers/17", config(r=2))
    model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "customers" / "17" / "adapter_config.json").is_file()


@pytest.mark.parametrize(
    ("config", "name"),
    [(FanLoraConfig, name) for name in ("lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector", "mlp", "layers")]
    + [(ParaConfig, name) for name in ("para_generator", "down", "query", "up_q_proj", "mlp", "layers")],
)
def test_a_single_adapter_may_have_the_name_of_a_part(config: Any, name: str) -> None:
    model = get_peft_model(TINY["llama"].base(), config(r=2))
    with pytest.raises(ValueError, match="part of this model"):
        model.add_adapter(name, config(r=2))
    alone = get_peft_model(TINY["llama"].base(), config(r=2), adapter_name=name)  # nothing is mixed up there
    with pytest.raises(ValueError, match=f"'{name}' is also the name of a part of this model"):
        alone.add_adapter("second", config(r=2))
    assert list(alone.peft_config) == [name]


@both
def test_names_that_only_look_like_parts_are_accepted(config: Any, tmp_path: Path) -> None:
    """`mlps` or `layers-0` is in no parameter's name, and every file is complete."""
    model = get_peft_model(TINY["llama"].base(), config(r=2))
    for name in ("mlps", "layers-0", "proj", "31", "lm", "default_2"):
        model.add_adapter(name, config(r=2))
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert len(expected) == (42 if config is FanLoraConfig else 3 * (2 + 3))
    for name in ("mlps", "layers-0", "proj", "31", "lm", "default_2"):
        assert load_file(tmp_path / name / "adapter_model.safetensors").keys() == expected


@both
def test_a_part_of_a_module_that_is_trained_whole(config: Any) -> None:
    model = get_peft_model(TINY["bert"].base(), config(r=2, task_type="SEQ_CLS", modules_to_save=["pooler"]))
    for name in ("classifier", "pooler", "dense", "modules_to_save", "original_module"):
        with pytest.raises(ValueError, match="part of this model"):
            model.add_adapter(name, config(r=2, task_type="SEQ_CLS"))
    assert list(model.peft_config) == ["default"]


def test_names_of_deleted_adapters_can_be_used_again() -> None:
    model = fanlora()
    model.add_adapter("tenant", FanLoraConfig(r=2))
    model.delete_adapter("tenant")
    model.add_adapter("tenant", FanLoraConfig(r=2))
    assert sum(".lora_A.tenant." in name for name in model.state_dict()) == 21
    assert torch.is_tensor(next(iter(model.state_dict().values())))
