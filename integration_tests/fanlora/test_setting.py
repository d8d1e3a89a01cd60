"""FanLoraSetting: saving, sharing, transfer to another model, and the arithmetic of ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from integration_tests.helpers.models import TINY, fanlora, tiny
from peft_fanlora import FanLoraConfig, FanLoraSetting


UP_AND_V = [f"model.layers.{layer}.{role}" for layer in range(3) for role in ("self_attn.v_proj", "mlp.up_proj")]


def scored() -> FanLoraSetting:
    model = fanlora()
    return model.score_modules([TINY["llama"].batch()], progress=False).select(keep=2)


def test_saves_and_loads(tmp_path: Path) -> None:
    setting = scored()
    setting.save_pretrained(tmp_path / "new" / "folder")
    loaded = FanLoraSetting.from_pretrained(tmp_path / "new" / "folder")
    assert loaded == setting
    assert loaded.calibration["method"] == "path"
    assert loaded.calibration["num_tokens"] == 16
    assert FanLoraSetting.from_pretrained(tmp_path / "new", subfolder="folder") == setting


def test_the_file_is_for_people(tmp_path: Path) -> None:
    FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V[:3]).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "fanlora_setting.json").read_text())
    assert content["format_version"] == 1
    assert content["blocks"]["model.layers.1"] == {"kept": {"self_attn.v_proj": None}, "dropped": {}}


def test_prints_as_a_small_table() -> None:
    setting = FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V[:3])
    assert str(setting).splitlines() == [
        "FanLoRA setting: 3 modules",
        "role              count  layers",
        "self_attn.v_proj      2  0-1",
        "mlp.up_proj           1  0",
    ]
    assert str(scored()).startswith("FanLoRA setting: 6 of 21 modules, by path")
    assert len(repr(scored())) < 80


def test_the_heat_map_is_of_all_scores_by_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[list[Any], dict[str, Any]]] = []
    monkeypatch.setattr(
        "peft_fanlora.fanlora.plots.plot_modules", lambda scores, **options: drawn.append(([*scores.items()], options))
    )
    setting, path = scored(), tmp_path / "plot.svg"
    setting.plot(path)
    replace(setting, calibration={}).plot(path)
    (scores, options), (_, without_method) = drawn
    assert dict(scores) == {**setting.kept, **setting.dropped}
    assert [module.role for module, _ in scores] == sorted(module.role for module, _ in scores)
    dots = "dots: the modules that are kept"
    assert options == {"path": path, "title": f"Importance by path; {dots}", "kept": setting.kept}
    assert without_method["title"] == f"Importance; {dots}"
    with pytest.raises(
        ValueError, match=r"^This FanLoRA setting has no scores: use the result of `scores.select`, as"
    ):
        FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V).plot(path)


def written(tmp_path: Path, **changes: Any) -> Path:
    content = FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V).to_dict() | changes
    (tmp_path / "fanlora_setting.json").write_text(json.dumps(content))
    return tmp_path


def test_an_unknown_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has format version 99, this peft_fanlora reads 1; upgrade"):
        FanLoraSetting.from_pretrained(written(tmp_path, format_version=99))


def test_an_incomplete_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no 'blocks'"):
        FanLoraSetting.from_pretrained(written(tmp_path, blocks=None))
    (tmp_path / "fanlora_setting.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        FanLoraSetting.from_pretrained(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="An adapter that was never pruned has no setting"):
        FanLoraSetting.from_pretrained(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="pass the folder"):
        scored().save_pretrained(tmp_path / "file")


def test_duplicates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj is named 2 times"):
        FanLoraSetting.from_modules(TINY["llama"].base(), ["model.layers.0.mlp.up_proj"] * 2)
    written(tmp_path)
    file = tmp_path / "fanlora_setting.json"
    file.write_text(file.read_text().replace('"mlp.up_proj": null', '"mlp.up_proj": 1, "mlp.up_proj": null', 1))
    with pytest.raises(ValueError, match=r"'mlp.up_proj' appears twice"):
        FanLoraSetting.from_pretrained(tmp_path)
    setting = scored()
    with pytest.raises(ValueError, match="among the kept and among the dropped"):
        FanLoraSetting(setting.kept, setting.kept, setting.num_layers)


def test_a_setting_that_keeps_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one module"):
        FanLoraSetting({})


def test_layers_outside_the_stack_are_refused() -> None:
    setting = scored()
    with pytest.raises(ValueError, match="which has 1 layers"):
        FanLoraSetting(setting.kept, {}, {"model.layers": 1})
    with pytest.raises(ValueError, match="has no number of layers for that stack"):
        FanLoraSetting(setting.kept)


@pytest.mark.support("a setting on another architecture", refused=True)
def test_another_family_is_refused() -> None:
    setting = FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V)
    with pytest.raises(ValueError, match="found on a model of type 'llama' and cannot be used for one of type 'gpt2'"):
        get_peft_model(TINY["gpt2"].base(), FanLoraConfig(setting=setting))


def test_modules_that_the_model_lacks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no linear layer 'model.layers.0.mlp.nothing'"):
        FanLoraSetting.from_modules(TINY["llama"].base(), ["model.layers.0.mlp.nothing"])
    blocks = {"model.layers.2": {"kept": {"mlp.other_proj": None, "mlp.third_proj": None}}}
    setting = FanLoraSetting.from_pretrained(written(tmp_path, blocks=blocks))
    with pytest.raises(ValueError, match=r"'model.layers.2.mlp.other_proj' \(nor 1 others that the setting has\)"):
        setting.resolve(TINY["llama"].base())


@pytest.mark.parametrize(("depth", "layers"), [(3, [0, 1, 2]), (5, [0, 0, 1, 2, 2]), (2, [0, 2]), (1, [0])])
def test_transfer_goes_by_relative_depth(depth: int, layers: list[int]) -> None:
    roles = ["self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"]
    names = [f"model.layers.{layer}.{role}" for layer, role in enumerate(roles)]
    setting = FanLoraSetting.from_modules(TINY["llama"].base(), names)
    transferred = setting.resolve(TINY["llama"].base(num_hidden_layers=depth))
    assert transferred.names == [f"model.layers.{layer}.{roles[source]}" for layer, source in enumerate(layers)]
    assert transferred.num_layers == {"model.layers": depth}


def test_transfer_takes_the_scores_of_all_modules() -> None:
    setting = scored()
    transferred = setting.resolve(TINY["llama"].base(num_hidden_layers=5))
    by_name = {module.name: score for module, score in [*transferred.kept.items(), *transferred.dropped.items()]}
    assert len(by_name) == len(transferred.kept) + len(transferred.dropped) == 35
    for module, score in [*setting.kept.items(), *setting.dropped.items()]:
        for layer, source in enumerate([0, 0, 1, 2, 2]):
            if source == module.layer:
                assert by_name[f"model.layers.{layer}.{module.role}"] == score


def test_transfer_to_a_model_with_another_head() -> None:
    from transformers import LlamaModel

    setting = FanLoraSetting.from_modules(TINY["llama"].base(), UP_AND_V)
    headless = LlamaModel(TINY["llama"].base().config)
    assert setting.resolve(headless).names == [name.removeprefix("model.") for name in UP_AND_V]


def test_an_encoder_decoder_keeps_its_stacks_apart() -> None:
    base = TINY["t5"].base()
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"]
    setting = FanLoraSetting.from_modules(base, names)
    assert setting.resolve(base).names == names
    assert "encoder.block.*.layer.0.SelfAttention.q" in str(setting)
    deeper = TINY["t5"].base(num_decoder_layers=4)
    assert setting.resolve(deeper).names == [
        "encoder.block.0.layer.0.SelfAttention.q",
        *(f"decoder.block.{layer}.layer.1.EncDecAttention.v" for layer in (2, 3)),
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_rank_for_budget_comes_closest(name: str) -> None:
    base = TINY[name].base()
    model = get_peft_model(TINY[name].base(), LoraConfig(r=8, target_modules="all-linear"))
    budget = model.get_nb_trainable_parameters()[0]
    names = list(model.base_model.targeted_module_names)
    assert FanLoraSetting.from_modules(base, names).rank_for_budget(base, budget) == 8
    half = FanLoraSetting.from_modules(base, names[::2])
    rank = half.rank_for_budget(base, budget)
    found = get_peft_model(TINY[name].base(), FanLoraConfig(setting=half, r=rank)).get_nb_trainable_parameters()[0]
    assert abs(found - budget) <= found / rank / 2
    with pytest.raises(ValueError, match="rank 1 on its"):
        half.rank_for_budget(base, 10)


def test_the_smallest_budget_is_half_a_rank() -> None:
    base = TINY["llama"].base()
    setting = FanLoraSetting.from_modules(base, UP_AND_V)
    per_rank = sum(sum(base.get_submodule(name).weight.shape) for name in UP_AND_V)
    assert [setting.rank_for_budget(base, int(per_rank * ranks)) for ranks in (0.6, 1, 2)] == [1, 1, 2]
    with pytest.raises(ValueError, match=f"rank 1 on its 6 modules already has {per_rank:,}"):
        setting.rank_for_budget(base, int(per_rank * 0.4))


def test_the_budget_of_llama_2_7b() -> None:
    """Two modules per layer, V and Up, match LoRA of rank 8 on all seven roles at rank 27."""
    with torch.device("meta"):
        base = LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))
    names = [f"model.layers.{layer}.{role}" for layer in range(32) for role in ("self_attn.v_proj", "mlp.up_proj")]
    assert FanLoraSetting.from_modules(base, names).rank_for_budget(base, num_parameters=20_000_000) == 27


def test_the_layers_of_vllm_contain_the_kept_modules() -> None:
    names = [
        "layers.0.self_attn.v_proj",
        "layers.1.mlp.up_proj",
        "layers.1.mlp.gate_proj",
        "layers.2.self_attn.o_proj",
    ]
    setting = FanLoraSetting.from_modules(tiny("llama"), [f"model.{name}" for name in names])
    assert setting.vllm_layers == [
        "model.layers.0.self_attn.qkv_proj",
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.2.self_attn.o_proj",
    ]
