"""Model cards: their code runs as it stands, and what a user has written in them stays."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from integration_tests.helpers.models import TINY, fanlora
from integration_tests.helpers.processes import run_python
from integration_tests.helpers.text import save_base, sentences
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig
from peft_fanlora.fanlora import card as fanlora_card


both = pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
PICTURE = "fanlora_importance.png"


def saved_base(folder: Path, architecture: str = "llama") -> PreTrainedModel:
    """A model in a folder, with a tokenizer, so that a card can name it."""
    return type(save_base(folder / "base", architecture)).from_pretrained(folder / "base")


def made(method: str, base: nn.Module, architecture: str = "llama", **options: Any) -> PeftModel:
    task_type = TINY[architecture].task_type
    if method == "PARA":
        return get_peft_model(base, ParaConfig(r=4, task_type=task_type, **options))
    return fanlora(architecture, base=base, **options)


def prune(model: PeftModel, architecture: str = "llama") -> FanLoraSetting:
    scores = model.score_modules([TINY[architecture].batch()], num_points=1, progress=False)
    return model.prune_modules(scores.select(2))


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def data_of(folder: Path) -> dict[str, Any]:
    return ModelCard(text_of(folder)).data.to_dict()


def code_of(folder: Path) -> str:
    return text_of(folder).partition("```python\n")[2].partition("\n```")[0]


def run(code: str, folder: Path) -> str:
    return run_python("-c", code, cwd=folder)


def test_the_code_runs_in_a_new_process(tmp_path: Path) -> None:
    for method in ("FanLoRA", "PARA"):
        made(method, saved_base(tmp_path)).save_pretrained(tmp_path / method)
        assert f"import peft_fanlora  # registers {method} with PEFT" in code_of(tmp_path / method)
    assert len(run(f"{code_of(tmp_path / 'FanLoRA')}\n{code_of(tmp_path / 'PARA')}", tmp_path).splitlines()) == 2


def test_the_error_without_the_import_is_the_one_that_the_card_names(tmp_path: Path) -> None:
    code = "from peft import PeftConfig"
    for method in ("FanLoRA", "PARA"):
        made(method, saved_base(tmp_path)).save_pretrained(tmp_path / method)
        assert f"raises `KeyError: '{method.upper()}'`" in text_of(tmp_path / method)
        code += f"\ntry: PeftConfig.from_pretrained({method!r})\nexcept Exception as error: print(repr(error))"
    assert run(code, tmp_path) == "KeyError('FANLORA')\nKeyError('PARA')\n"


@both
@pytest.mark.parametrize("architecture", ["gpt2", "t5", "bert"])
def test_the_code_runs_for_each_task(
    method: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    made(method, saved_base(tmp_path, architecture), architecture).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(code_of(tmp_path / "adapter"), variables)
    assert isinstance(variables["model"], PeftModel)
    assert ("logits" in capsys.readouterr().out) == (architecture == "bert")


def test_the_code_of_a_setting_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    setting = prune(made("FanLoRA", saved_base(tmp_path)))
    setting.save_pretrained(tmp_path / "setting")
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(code_of(tmp_path / "setting"), variables)
    assert variables["model"].peft_config["default"].target_modules == set(setting.names)
    assert "trainable params" in capsys.readouterr().out
    assert {"fanlora-setting", "fanlora"} <= set(data_of(tmp_path / "setting")["tags"])


def test_a_model_that_is_not_of_transformers_gets_a_card(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    get_peft_model(base, FanLoraConfig(target_modules=["0"])).save_pretrained(tmp_path)
    assert "base = ...  # the model that the adapter was trained on" in code_of(tmp_path)


def test_what_a_fanlora_card_says(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    base.name_or_path = base.config._name_or_path = "me/base"
    model = made("FanLoRA", base)
    model.save_pretrained(tmp_path / "adapter")
    assert "on 21 linear layers; it was not pruned." in text_of(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / PICTURE).exists()
    setting = prune(model)
    model.save_pretrained(tmp_path / "adapter")
    text, data = text_of(tmp_path / "adapter"), data_of(tmp_path / "adapter")
    parameters = sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)
    assert f"r = 4 and α = 8 on 6 of 21 linear layers, chosen by a score [1]. It has {parameters:,} parameters" in text
    for role in setting.roles:
        layers = sum(module.role == role for module in setting.kept)
        assert f"| `{role}` | {layers} | " in text
    assert "| score | path |" in text and "| kept | 2 |" in text
    assert f"]({PICTURE})" in text and (tmp_path / "adapter" / PICTURE).stat().st_size > 10_000
    assert "export_lora" in text and 'from_pretrained(base, "adapter", subfolder="plain-lora")' in text
    assert "not pruned" not in text
    assert data["base_model"] == "me/base" and data["library_name"] == "peft"
    assert "license" not in data  # the user's to choose


def test_a_converted_adapter_is_shown_as_it_was_saved(tmp_path: Path) -> None:
    """PEFT converts a PiSSA adapter to one of twice the rank, and its model keeps the old one."""
    initial = made("FanLoRA", saved_base(tmp_path), init_lora_weights="pissa")
    initial.peft_config["default"].init_lora_weights = True
    initial.save_pretrained(tmp_path / "initial")
    model = made("FanLoRA", saved_base(tmp_path), init_lora_weights="pissa")
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert "r = 8 and α = 16" in text_of(tmp_path / "adapter")


def test_what_a_para_card_says(tmp_path: Path) -> None:
    made("PARA", saved_base(tmp_path), prompt_end_token_ids=[5, 6]).save_pretrained(tmp_path / "adapter")
    text = text_of(tmp_path / "adapter")
    assert "first match of the token ids `[5, 6]`" in text
    assert "| 4 | attention | gelu | all |" in text
    made("PARA", saved_base(tmp_path)).save_pretrained(tmp_path / "other")
    assert "token ids" not in text_of(tmp_path / "other")
    made("PARA", saved_base(tmp_path, "t5"), "t5").save_pretrained(tmp_path / "t5")
    assert "The prompt is the encoder's whole input." in text_of(tmp_path / "t5")


@both
def test_what_a_user_writes_stays(method: str, tmp_path: Path) -> None:
    model = made(method, saved_base(tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    first = text_of(tmp_path / "adapter")
    edited = first.replace("library_name:", "license: mit\nlibrary_name:").replace("tags:\n", "tags:\n- poems\n")
    edited = edited.replace(f"# {method} adapter", "# Sonnets\n\nTrained on sonnets.") + "\nMore below.\n"
    (tmp_path / "adapter" / "README.md").write_text(edited)
    model.save_pretrained(tmp_path / "adapter")
    model.save_pretrained(tmp_path / "adapter")
    assert text_of(tmp_path / "adapter") == edited


def test_a_card_that_was_there_before_gets_a_part(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nMy words.\n")
    model = made("FanLoRA", saved_base(tmp_path))
    model.save_pretrained(tmp_path / "adapter")
    text = text_of(tmp_path / "adapter")
    assert text.index("# Mine\n\nMy words.") < text.index("import peft_fanlora")
    assert "license: mit" in text and "## About" not in text


def test_trls_card_keeps_its_text(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    base = saved_base(tmp_path)
    arguments = SFTConfig(str(tmp_path / "run"), use_cpu=True, max_steps=1, report_to="none", save_strategy="no")
    trainer = SFTTrainer(
        made("FanLoRA", base),
        args=arguments,
        train_dataset=Dataset.from_dict({"text": sentences(8)}),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    trainer.create_model_card(model_name="mine")
    trainer.save_model()
    text = text_of(tmp_path / "run")
    assert "# Model Card for mine" in text and "Training procedure" in text
    assert "import peft_fanlora" in text
    assert {"sft", "trl", "fanlora"} <= set(data_of(tmp_path / "run")["tags"])


@both
def test_several_adapters_share_a_card(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(method, saved_base(tmp_path))
    model.add_adapter("second", model.peft_config["default"].__class__(r=2, task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "both")
    text = text_of(tmp_path / "both")
    assert text.count("import peft_fanlora") == 2 and text.count("## About") == 1
    assert 'PeftModel.from_pretrained(base, "both", subfolder="second")' in text
    model.save_pretrained(tmp_path / "second", selected_adapters=["second"])
    assert text_of(tmp_path / "second").count("import peft_fanlora") == 1
    model.save_pretrained(tmp_path / "both", selected_adapters=["second"])
    assert text_of(tmp_path / "both") == text
    monkeypatch.chdir(tmp_path)
    variables: dict[str, Any] = {}
    exec(code_of(tmp_path / "second"), variables)
    assert variables["model"].peft_config["default"].r == 2


@both
def test_only_the_main_process_writes(method: str, tmp_path: Path) -> None:
    made(method, saved_base(tmp_path)).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter" / "README.md").exists()


def test_without_matplotlib_the_card_has_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("FanLoRA", saved_base(tmp_path))
    prune(model)
    model.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(fanlora_card, "find_spec", lambda name: None)
    model.save_pretrained(tmp_path / "adapter")
    assert PICTURE not in text_of(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / PICTURE).exists()
    assert "### Calibration" in text_of(tmp_path / "adapter")


def test_a_setting_without_scores_has_no_picture(tmp_path: Path) -> None:
    base = TINY["llama"].base()
    setting = FanLoraSetting.from_modules(base, ["model.layers.0.mlp.up_proj"])
    setting.save_pretrained(tmp_path)
    assert "| `mlp.up_proj` | 1 | 0 |" in text_of(tmp_path)
    assert PICTURE not in text_of(tmp_path) and not (tmp_path / PICTURE).exists()
    with pytest.raises(ValueError, match="has no scores"):
        setting.plot(tmp_path / "picture.png")


def test_other_methods_keep_pefts_card(tmp_path: Path) -> None:
    lora = get_peft_model(saved_base(tmp_path), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    assert "peft_fanlora" not in text_of(tmp_path / "lora")
    assert "# Model Card for Model ID" in text_of(tmp_path / "lora")


def test_a_third_method_is_saved_with_its_card_and_loaded(tmp_path: Path) -> None:
    """The method that docs/extending.md registers, in processes of their own: it is no method of this package."""
    page = (Path(__file__).parents[2] / "docs/extending.md").read_text()
    method = page.partition("## Methods")[2].partition("```python\n")[2].partition("\n```\n")[0]
    saved_base(tmp_path)
    save = f"""{method}
from peft import get_peft_model
from transformers import AutoModelForCausalLM

model = get_peft_model(AutoModelForCausalLM.from_pretrained("base"), ToyConfig(r=3, task_type="CAUSAL_LM"))
model.save_pretrained("toy")
"""
    run(save, tmp_path)
    assert "Toy of rank 3" in text_of(tmp_path / "toy") and "toy" in data_of(tmp_path / "toy")["tags"]
    load = f"{method}\n{code_of(tmp_path / 'toy')}\nprint(type(model.base_model).__name__)"
    assert run(load, tmp_path).splitlines()[-1] == "ToyModel"
