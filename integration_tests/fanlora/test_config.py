"""FanLoraConfig takes what LoraConfig takes, and refuses at once what pruning can't honour."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model

from integration_tests.helpers.models import BERT, LLAMA, TINY, fanlora, logits
from peft_fanlora import FanLoraConfig, FanLoraSetting


def test_has_every_field_of_lora() -> None:
    ours = {field.name for field in fields(FanLoraConfig)}
    assert ours - {field.name for field in fields(LoraConfig)} == {"setting"}
    assert FanLoraConfig().target_modules == "all-linear"
    assert FanLoraConfig(target_modules=None).target_modules == "all-linear"


@pytest.mark.support("`bias`, LoftQ", refused=True)
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"bias": "all"}, "would remain after modules are pruned"),
        ({"bias": "lora_only"}, "Use bias='none'"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "Load the base model quantised"),
        ({"setting": 3}, "`setting` is a int; pass a FanLoraSetting"),
    ],
)
def test_refuses(arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FanLoraConfig(**arguments)


@pytest.mark.parametrize("layers", [1, [1]])
@pytest.mark.parametrize("target", [{}, {"target_modules": None}, {"target_modules": "all-linear"}])
def test_all_linear_layers_of_some_blocks(layers: int | list[int], target: dict[str, Any], tmp_path: Path) -> None:
    """With `target_modules=None` the layers were ignored, and without it the default was refused."""
    FanLoraConfig(layers_to_transform=layers, **target).save_pretrained(tmp_path)
    config = FanLoraConfig.from_pretrained(tmp_path)
    names = get_peft_model(TINY["llama"].base(), config).base_model.targeted_module_names
    assert len(names) == 7 and all(name.startswith("model.layers.1.") for name in names)
    for wrong in ({"layers_to_transform": [9]}, {"layers_to_transform": 0, "layers_pattern": "blocks"}):
        with pytest.raises(ValueError, match="leaves no linear layer of this model"):
            get_peft_model(TINY["llama"].base(), FanLoraConfig(**wrong))


@pytest.mark.support("KaSA, Arrow", refused=True)
def test_refuses_variants_that_change_the_base_or_have_no_modules() -> None:
    from peft.tuners.lora.config import ArrowConfig, KasaConfig

    with pytest.raises(ValueError, match="truncates the base weights"):
        FanLoraConfig(kasa_config=KasaConfig())
    with pytest.raises(ValueError, match="no modules of its own"):
        FanLoraConfig(arrow_config=ArrowConfig())


def test_a_setting_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no fanlora_setting\.json"):
        FanLoraConfig(setting=str(tmp_path))


def test_a_setting_and_other_target_modules_disagree() -> None:
    base = TINY["llama"].base()
    setting = FanLoraSetting.from_modules(base, ["model.layers.0.mlp.up_proj"])
    before = logits(base, TINY["llama"].batch())
    with pytest.raises(ValueError, match="`target_modules` and `setting` disagree"):
        get_peft_model(base, FanLoraConfig(setting=setting, target_modules=["up_proj", "down_proj"]))
    assert torch.equal(logits(base, TINY["llama"].batch()), before)
    assert not any("lora" in name for name, _ in base.named_modules())


@pytest.mark.parametrize("kind", ["object", "string", "path"])
def test_a_setting_in_every_form(kind: str, tmp_path: Path) -> None:
    base = TINY["llama"].base()
    setting = FanLoraSetting.from_modules(base, ["model.layers.1.mlp.up_proj", "model.layers.2.self_attn.v_proj"])
    setting.save_pretrained(tmp_path)
    given = {"object": setting, "string": str(tmp_path), "path": tmp_path}[kind]
    model = get_peft_model(base, FanLoraConfig(setting=given, r=2))
    assert sorted(model.base_model.targeted_module_names) == sorted(setting.names)
    assert model.peft_config["default"].setting.names == setting.names


def test_round_trip_through_json(tmp_path: Path) -> None:
    model = fanlora()
    model.prune_modules(FanLoraSetting.from_modules(model.get_base_model(), ["model.layers.1.mlp.up_proj"]))
    config = model.peft_config["default"]
    config.save_pretrained(str(tmp_path))
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, FanLoraConfig)
    assert loaded.setting == config.setting
    assert set(loaded.target_modules) == config.target_modules


def test_an_outdated_setting_file_is_removed(tmp_path: Path) -> None:
    """Saving an unpruned adapter over a pruned one must not leave the old one's setting beside it."""
    model = fanlora()
    (tmp_path / "fanlora_setting.json").write_text("{}")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "fanlora_setting.json").exists()


@pytest.mark.support("forward")
@pytest.mark.parametrize("name", TINY)
def test_a_fresh_adapter_changes_no_logit(name: str) -> None:
    tiny = TINY[name]
    before = logits(tiny.base(), tiny.batch())
    model = get_peft_model(tiny.base(), FanLoraConfig(r=4, task_type=tiny.task_type)).eval()
    assert torch.equal(logits(model, tiny.batch()), before)


@pytest.mark.support("training")
@pytest.mark.parametrize("name", TINY)
def test_nothing_but_the_adapter_trains(name: str) -> None:
    tiny = TINY[name]
    model = get_peft_model(tiny.base(), FanLoraConfig(r=4, task_type=tiny.task_type))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    heads = "modules_to_save" if tiny.task_type == "SEQ_CLS" else "lora_"
    assert all("lora_" in name or heads in name for name in trained)


@pytest.mark.parametrize("excluded", [None, ["query"], r".*\.query"])
@pytest.mark.parametrize(
    ("task", "head"), [("TokenClassification", "classifier"), ("QuestionAnswering", "qa_outputs")]
)
def test_a_head_that_is_trained_in_full_gets_no_lora(task: str, head: str, excluded: list[str] | str | None) -> None:
    """PEFT refuses to train a head in full that is adapted as well, so that these tasks did not start."""
    base = getattr(transformers, f"BertFor{task}")(transformers.BertConfig(**BERT))
    task_type = {"classifier": "TOKEN_CLS", "qa_outputs": "QUESTION_ANS"}[head]
    model = get_peft_model(base, FanLoraConfig(r=2, task_type=task_type, exclude_modules=excluded))
    assert f"{head}.modules_to_save.default.weight" in {
        name.removeprefix("base_model.model.")
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    adapted_names = model.base_model.targeted_module_names
    assert len(adapted_names) == 3 * (6 if excluded is None else 5) and head not in adapted_names


def test_a_router_that_is_no_plain_linear_layer_gets_no_lora() -> None:
    """The router of Llama 4 is a linear layer by its class, but returns two tensors, at which LoRA's layer failed."""
    sizes = {**LLAMA, "num_local_experts": 2, "head_dim": 4, "intermediate_size_mlp": 24}
    base = transformers.Llama4ForCausalLM(transformers.Llama4TextConfig(**sizes))
    model = get_peft_model(base, FanLoraConfig(r=2))
    assert not any("router" in name for name in model.base_model.targeted_module_names)
    assert logits(model, TINY["llama"].batch()).isfinite().all()


def test_mamba_layers_whose_weight_goes_around_the_adapter_are_refused() -> None:
    """PEFT guards its own types alone, so that FanLoRA's default adapted layers without an effect."""
    base = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1)
    )
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(base, FanLoraConfig(r=2))
