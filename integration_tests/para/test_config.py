"""The configuration: its fields, its errors and the modules that it selects."""

import inspect
import json

import pytest
import torch
import transformers as tf
from peft import PeftConfig, PeftType, get_peft_model

from integration_tests.helpers.models import tiny
from peft_fanlora import ParaConfig, ParaModel


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, r"r=0 is not a width.*r=12"),
        ({"r": 2.5}, r"r=2.5 is not a width"),
        ({"pooling": "sum"}, r"pooling='sum' is unknown: choose one of 'attention', 'mean', 'max', 'last'"),
        ({"activation": "gleu"}, r"activation='gleu' is unknown.*'rational'.*ACT2FN"),
        ({"para_dropout": 1.0}, r"para_dropout=1.0 is not a probability below 1"),
        ({"para_dropout": -0.1}, r"para_dropout=-0.1"),
        ({"prompt_end_token_ids": []}, r"prompt_end_token_ids=\[\] is not a list of token ids"),
        ({"prompt_end_token_ids": "</s>"}, r"prompt_end_token_ids='</s>'.*tokenizer.encode"),
        ({"prompt_end_token_ids": 5}, r"prompt_end_token_ids=5"),
        ({"prompt_end_token_ids": [1, -2]}, r"prompt_end_token_ids=\[1, -2\]"),
        ({"layers_pattern": "layers"}, r"`layers_to_transform` must also be.*layers_pattern='layers' has no effect"),
        (
            {"layers_to_transform": [0], "target_modules": ".*q_proj"},
            r"layers_to_transform=\[0\].*target_modules='\.\*q_proj'",
        ),
    ],
)
def test_errors_name_the_value_the_reason_and_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        ParaConfig(**fields)


def test_an_unknown_architecture_is_shown_an_example():
    base = tf.AutoModelForCausalLM.from_config(
        tf.CTRLConfig(vocab_size=20, n_embd=16, dff=16, n_layer=1, n_head=2, n_positions=16)
    )
    with pytest.raises(
        ValueError, match=r"Please specify `target_modules`.*the architecture 'ctrl'.*target_modules=\['q_proj'"
    ):
        get_peft_model(base, ParaConfig())


def test_every_field_is_explained():
    own = set(ParaConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__)
    assert {"r", "target_modules", "pooling", "activation", "prompt_end_token_ids", "para_dropout"} <= own
    for name in own:
        assert ParaConfig.__dataclass_fields__[name].metadata["help"], name
        assert f"\n    {name}: " in inspect.getdoc(ParaConfig), name


def test_the_config_survives_json(tmp_path):
    config = ParaConfig(
        r=5, target_modules=["a", "b"], prompt_end_token_ids=(3, 4), layers_to_transform=[0], layers_pattern="layers"
    )
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PARA"
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, ParaConfig) and loaded.peft_type is PeftType.PARA
    assert (loaded.r, loaded.target_modules, loaded.prompt_end_token_ids) == (5, {"a", "b"}, [3, 4])


def test_peft_knows_the_method():
    assert PeftType.PARA in list(PeftType) and ParaModel.prefix == "para_"


def test_layers_to_transform_and_exclude_modules():
    model = get_peft_model(tiny("llama"), ParaConfig(layers_to_transform=[1], exclude_modules=["q_proj"]))
    assert sorted(model.base_model.targeted_module_names) == [
        "model.layers.1.mlp.up_proj",
        "model.layers.1.self_attn.v_proj",
    ]
    every = get_peft_model(tiny("llama"), ParaConfig(target_modules="all-linear"))
    assert len(every.base_model.targeted_module_names) == 21


def test_random_initial_vectors():
    torch.manual_seed(0)
    base = tiny("llama")
    ids = torch.randint(3, 60, (2, 6))
    expected = base(ids).logits
    model = get_peft_model(base, ParaConfig(init_para_weights=False)).eval()
    assert (model(ids).logits - expected).abs().max() > 1e-3
