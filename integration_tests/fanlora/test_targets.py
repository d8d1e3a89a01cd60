"""A setting means exactly the modules that it names, also where other names end in theirs."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType, get_peft_model
from torch import nn

from integration_tests.helpers.models import TINY, randomize
from peft_fanlora import FanLoraConfig, FanLoraModel, FanLoraSetting, export_lora
from peft_fanlora.fanlora.candidates import adapted_layers


class Stack(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"lin": nn.Linear(6, 6), "out": nn.Linear(6, 6)}) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["out"](layer["lin"](x).relu())
        return x


class Drafted(Stack):
    """`layers.0.lin` and `draft.layers.0.lin` in one model."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__(depth)
        self.draft = Stack(depth)

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        return super().forward(x) + 2 * self.draft(x)


def drafted(**arguments: int) -> Drafted:
    torch.manual_seed(0)
    return Drafted(**arguments)


X = torch.linspace(-1, 1, 12).reshape(2, 6)
KEPT = ["layers.0.lin", "layers.2.out", "draft.layers.1.lin"]


def names_of(model: Any, adapter: str = "default") -> list[str]:
    return sorted(adapted_layers(model.base_model.model, adapter))


def pruned(**config: Any) -> PeftModel:
    model = get_peft_model(drafted(), FanLoraConfig(r=2, **config))
    randomize(model)
    model.prune_modules(FanLoraSetting.from_modules(model.base_model.model, KEPT))
    return model


def test_a_setting_adapts_no_module_whose_name_ends_like_one_of_its_own() -> None:
    """It once took `draft.layers.0.lin` for `layers.0.lin`: five modules instead of three."""
    setting = FanLoraSetting.from_modules(drafted(), KEPT)
    model = get_peft_model(drafted(), FanLoraConfig(setting=setting, r=2))
    assert names_of(model) == sorted(KEPT)
    assert model.peft_config["default"].setting == setting


@pytest.mark.parametrize("config", [{}, {"rank_pattern": {"layers.0.lin": 3}, "alpha_pattern": {"lin": 5}}], ids=str)
def test_a_pruned_adapter_loads_as_fanlora_and_as_plain_lora(config: dict[str, Any], tmp_path: Path) -> None:
    model = pruned(**config)
    expected = model(X)
    assert names_of(model) == sorted(KEPT)
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(drafted(), tmp_path / "adapter")
    assert names_of(loaded) == sorted(KEPT)
    assert torch.equal(loaded(X), expected)
    second = get_peft_model(drafted(), FanLoraConfig(r=2))
    second.load_adapter(tmp_path / "adapter", "second")
    assert names_of(second, "second") == sorted(KEPT)

    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text()) | {"peft_type": "LORA"}
    file.write_text(json.dumps({key: value for key, value in fields.items() if key != "setting"}))
    plain = PeftModel.from_pretrained(drafted(), tmp_path / "adapter")
    assert names_of(plain) == sorted(KEPT)
    torch.testing.assert_close(plain(X), expected)


def test_an_exported_adapter_is_exact(tmp_path: Path) -> None:
    model = pruned()
    export_lora(model, tmp_path)
    plain = PeftModel.from_pretrained(drafted(), tmp_path)
    assert names_of(plain) == sorted(KEPT)
    torch.testing.assert_close(plain(X), model(X))


def test_names_stay_a_list_where_no_other_name_has_the_same_ending(tmp_path: Path) -> None:
    """Engines read target_modules as a list of names."""
    torch.manual_seed(0)
    model = get_peft_model(Stack(), FanLoraConfig(r=2))
    model.prune_modules(FanLoraSetting.from_modules(model.base_model.model, KEPT[:2]))
    assert model.peft_config["default"].target_modules == set(KEPT[:2])
    export_lora(model, tmp_path)
    assert sorted(json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"]) == KEPT[:2]


def test_many_modules_stay_exact(tmp_path: Path) -> None:
    """PEFT shortens target_modules of twenty names and more to what they end in."""
    names = [f"layers.{layer}.{role}" for layer in range(12) for role in ("lin", "out")]
    torch.manual_seed(0)
    model = get_peft_model(Stack(12), FanLoraConfig(setting=FanLoraSetting.from_modules(Stack(12), names[:23]), r=2))
    assert model.peft_config["default"].target_modules == set(names[:23])
    randomize(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(drafted(depth=12), tmp_path)  # a model that has more
    assert names_of(loaded) == sorted(names[:23])


def test_combining_adapters_adapts_what_they_adapt() -> None:
    model = pruned()
    model.add_adapter("all", FanLoraConfig(r=2, target_modules=["draft.layers.2.out"]))
    randomize(model)
    before = {name: config.target_modules for name, config in model.peft_config.items()}
    model.add_weighted_adapter(["default", "all"], [0.5, 0.5], "both", combination_type="cat")
    assert names_of(model, "both") == sorted([*KEPT, "draft.layers.2.out"])
    assert {name: model.peft_config[name].target_modules for name in before} == before


def test_an_excluded_head_excludes_no_other_module() -> None:
    class Tagger(Drafted):
        def __init__(self) -> None:
            super().__init__()
            self.classifier = nn.Linear(6, 2)
            self.draft.classifier = nn.Linear(6, 6)

    config = FanLoraConfig(r=2, task_type=TaskType.TOKEN_CLS, exclude_modules=["1.lin"])
    names = adapted_layers(FanLoraModel(Tagger(), config, "default").model, "default")
    assert "draft.classifier" in names and "classifier" not in names
    assert "layers.0.lin" in names and "layers.1.lin" not in names and "draft.layers.1.lin" not in names


def test_a_setting_of_another_stack_is_refused() -> None:
    """Its name ends in the name of the model's stack, and its choice is another one."""
    setting = FanLoraSetting.from_modules(drafted(), ["draft.layers.0.lin"])
    with pytest.raises(ValueError, match=r"'draft\.layers', but the model's blocks are in"):
        setting.resolve(Stack())
    both = FanLoraSetting.from_modules(drafted(), ["layers.0.lin", "draft.layers.1.out"])
    with pytest.raises(ValueError, match=r"'draft\.layers'"):
        both.resolve(Stack())
    assert FanLoraSetting.from_modules(Stack(), ["layers.0.lin"]).resolve(drafted()).names == ["layers.0.lin"]


def test_a_setting_fits_the_model_with_and_without_its_head() -> None:
    base = TINY["llama"].base()
    whole = FanLoraSetting.from_modules(base, ["model.layers.1.mlp.up_proj"])
    bare = whole.resolve(base.model)
    assert bare.names == ["layers.1.mlp.up_proj"]
    assert bare.resolve(base).names == whole.names
    wrapped = nn.ModuleDict({"backbone": base})
    assert whole.resolve(wrapped).names == ["backbone.model.layers.1.mlp.up_proj"]
