"""Pruning removes modules for good, from one adapter among several, or changes nothing at all."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import BitsAndBytesConfig

from integration_tests.helpers.models import LLAMA, TINY, fanlora, logits, randomize
from peft_fanlora import FanLoraConfig, FanLoraSetting
from peft_fanlora.fanlora.candidates import lora_modules
from peft_fanlora.fanlora.gates import module_gates


def setting_of(model: PeftModel, keep: slice = slice(None, None, 3)) -> FanLoraSetting:
    names = list(lora_modules(model.get_base_model(), model.active_adapters[0]))
    return FanLoraSetting.from_modules(model.get_base_model(), names[keep])


def gated_logits(model: PeftModel, setting: FanLoraSetting, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output with the gates of the modules that the setting drops at 0."""
    layers = lora_modules(model.get_base_model(), "default")
    initial = model.base_model._initial_factors.get("default", {})
    with module_gates(layers, "default", initial) as gates:
        gates.set(torch.tensor([float(name in setting.names) for name in gates.names]))
        return logits(model, batch)


@pytest.mark.support("pruning")
@pytest.mark.parametrize("name", TINY)
def test_pruned_equals_gated(name: str) -> None:
    model, batch = fanlora(name), TINY[name].batch()
    setting = setting_of(model)
    expected, unpruned = gated_logits(model, setting, batch), logits(model, batch)
    assert not torch.allclose(expected, unpruned)
    returned = model.prune_modules(setting)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    assert returned.names == setting.names
    remaining = set(setting.names) | TINY[name].others
    assert model.peft_config["default"].target_modules == remaining
    assert model.peft_config["default"].setting == setting
    assert set(model.base_model.targeted_module_names) == remaining
    left = {key.partition(".lora_")[0] for key in model.state_dict() if ".lora_" in key}
    assert left == {f"base_model.model.{name}" for name in remaining}
    assert all(parameter.requires_grad for key, parameter in model.named_parameters() if "lora_" in key)


@pytest.mark.parametrize(
    "config",
    [
        {"use_dora": True},
        {"use_rslora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "eva"},
        {"lora_dropout": 0.5},
        {"rank_pattern": {"mlp.up_proj": 2}, "alpha_pattern": {"self_attn.q_proj": 5}},
    ],
    ids=str,
)
def test_pruned_equals_gated_for_variants(config: dict[str, Any]) -> None:
    model, batch = fanlora(**config), TINY["llama"].batch()
    if config.get("use_dora"):  # as training would move the magnitudes
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.data *= 1.3
    setting = setting_of(model)
    expected = gated_logits(model, setting, batch)
    model.prune_modules(setting)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("initialisation", ["pissa", "olora"])
def test_dropping_everything_that_changed_a_weight_restores_it(initialisation: str) -> None:
    """PiSSA takes a part out of each base weight; a pruned module must not leave the hole behind."""
    model = fanlora(init_lora_weights=initialisation)
    setting = setting_of(model, slice(0, 1))
    model.prune_modules(setting)
    original = TINY["llama"].base().state_dict()
    for name, weight in model.get_base_model().state_dict().items():
        if "lora_" not in name and "base_layer" not in name:
            torch.testing.assert_close(weight, original[name], rtol=0, atol=1e-6)


@pytest.mark.support("pruning one of several adapters")
def test_one_adapter_among_several() -> None:
    model, batch = fanlora(), TINY["llama"].batch()
    model.add_adapter("other", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    randomize(model)
    setting = setting_of(model)
    model.set_adapter("other")
    of_other = logits(model, batch)
    model.set_adapter("default")
    expected = gated_logits(model, setting, batch)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters() if ".other." in name}

    model.prune_modules(setting)
    # PEFT puts another adapter in the place of a deleted active one, layer by layer.
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters() if ".other." in name}
    model.set_adapter("other")
    assert torch.equal(logits(model, batch), of_other)
    assert len(lora_modules(model.get_base_model(), "other")) == 21

    model.prune_modules(setting_of(model, slice(1, None, 3)), adapter_name="other")
    wrapped = {name for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert wrapped == model.peft_config["default"].target_modules | model.peft_config["other"].target_modules
    model.delete_adapter("default")
    model.set_adapter("other")
    logits(model, batch)


def test_an_inactive_adapter_by_name() -> None:
    model, batch = fanlora(), TINY["llama"].batch()
    model.add_adapter("other", FanLoraConfig(r=2, task_type="CAUSAL_LM"))
    before = logits(model, batch)
    model.prune_modules(setting_of(model), adapter_name="other")
    assert torch.equal(logits(model, batch), before)
    assert len(lora_modules(model.get_base_model(), "other")) == 7


def test_other_lora_layers_and_saved_modules_stay() -> None:
    """LoRA on an embedding or a head is not a candidate for pruning: it stays where it was asked for."""
    model = fanlora("bert", target_modules=["query", "value", "word_embeddings"], modules_to_save=["classifier"])
    setting = setting_of(model, slice(0, 2))
    model.prune_modules(setting)
    assert model.peft_config["default"].target_modules == {*setting.names, "bert.embeddings.word_embeddings"}
    assert any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
    again = model.score_modules([TINY["bert"].batch()], progress=False)
    assert list(again) == setting.names


def test_pruning_twice_goes_further() -> None:
    model, batches = fanlora(), [TINY["llama"].batch()]
    model.prune_modules(model.score_modules(batches, progress=False).select(4))
    model.prune_modules(model.score_modules(batches, progress=False).select(2))
    assert len(lora_modules(model.get_base_model(), "default")) == 6


@pytest.mark.support("a setting on a model of another depth")
def test_a_setting_of_another_depth_is_transferred() -> None:
    shallow = fanlora(base=TINY["llama"].base(num_hidden_layers=1))
    model = fanlora()
    returned = model.prune_modules(setting_of(shallow, slice(0, 2)))
    assert len(returned.kept) == 6


def test_patterns_keep_only_what_still_matches() -> None:
    model = fanlora(rank_pattern={"mlp.up_proj": 2, "layers.1.mlp.down_proj": 3})
    model.prune_modules(FanLoraSetting.from_modules(model.get_base_model(), ["model.layers.0.mlp.up_proj"]))
    assert model.peft_config["default"].rank_pattern == {"mlp.up_proj": 2}


@pytest.mark.support("bitsandbytes, 4 and 8 bit")
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers(bits: int) -> None:
    tiny = TINY["llama"]
    config = {**LLAMA, "hidden_size": 64, "head_dim": 16, "intermediate_size": 64, "num_hidden_layers": 2}
    import tempfile

    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
        quantised = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
        base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu")
    model, batch = fanlora(base=base), tiny.batch()
    scores = model.score_modules([batch], progress=False)
    assert len(scores) == 14
    assert any(scores.values())
    setting = scores.select(2)
    expected = gated_logits(model, setting, batch)
    model.prune_modules(setting)
    torch.testing.assert_close(logits(model, batch), expected, rtol=0, atol=1e-5)
    assert sum("bit" in type(module).__name__ for module in base.modules()) == 14 + 4


@pytest.mark.support("`add_weighted_adapter`")
def test_weighted_combination_after_pruning() -> None:
    model = fanlora()
    model.add_adapter("other", FanLoraConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model)
    settings = [setting_of(model, slice(0, 6)), setting_of(model, slice(3, 9))]
    for name, setting in zip(("default", "other"), settings, strict=True):
        model.prune_modules(setting, adapter_name=name)
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="cat")
    assert set(lora_modules(model.get_base_model(), "both")) == set(settings[0].names) | set(settings[1].names)
    assert model.peft_config["both"].setting is None
    assert model.peft_config["default"].setting == settings[0]


class TestRefusals:
    """Each says why, and leaves the model as it was."""

    def refused(self, model: PeftModel, setting: Any, error: type[Exception], reason: str, **arguments: Any) -> None:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        targets = model.peft_config["default"].target_modules
        with pytest.raises(error, match=reason):
            model.prune_modules(setting, **arguments)
        assert model.peft_config["default"].target_modules == targets
        assert model.peft_config["default"].setting is None
        torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

    def test_merged(self) -> None:
        model = fanlora()
        setting = setting_of(model)
        model.merge_adapter()
        self.refused(model, setting, ValueError, "unmerge_adapter")

    def test_no_setting(self) -> None:
        self.refused(fanlora(), ["up_proj"], ValueError, "`setting` is a list; pass the result of")

    def test_unknown_adapter(self) -> None:
        model = fanlora()
        self.refused(model, setting_of(model), ValueError, "no adapter 'nobody'", adapter_name="nobody")

    def test_modules_without_this_adapter(self) -> None:
        model = fanlora(target_modules=["q_proj", "v_proj"])
        setting = FanLoraSetting.from_modules(model.get_base_model(), ["model.layers.0.mlp.up_proj"])
        self.refused(
            model, setting, ValueError, r"keeps 'model.layers.0.mlp.up_proj', which adapter 'default' does not"
        )

    def test_another_family(self) -> None:
        self.refused(fanlora(), setting_of(fanlora("gpt2")), ValueError, "found on a model of type 'gpt2'")

    def test_in_the_middle_of_a_forward(self) -> None:
        model = fanlora()
        setting = setting_of(model)

        def hook(module: nn.Module, inputs: Any) -> None:
            self.refused(model, setting, RuntimeError, "in the middle of a call")

        handle = model.get_base_model().model.layers[1].mlp.register_forward_pre_hook(hook)
        logits(model, TINY["llama"].batch())
        handle.remove()
        model.prune_modules(setting)

    def test_an_adapter_without_linear_layers(self) -> None:
        model = fanlora("llama", target_modules=["embed_tokens"])
        setting = setting_of(fanlora())
        with pytest.raises(ValueError, match="adapts no linear layer that FanLoRA chooses among"):
            model.prune_modules(setting)

    def test_plain_lora_has_no_pruning(self) -> None:
        model = get_peft_model(TINY["llama"].base(), LoraConfig(target_modules="all-linear"))
        assert not hasattr(model, "prune_modules")


def test_a_shared_configuration_stays_as_it_was() -> None:
    """TRL gives a policy and its frozen reference one configuration; pruning one must not rewrite the other's."""
    model = fanlora(rank_pattern={"q_proj": 2})
    shared = model.peft_config["default"]
    model.add_adapter("ref", shared)
    before = shared.to_dict()
    scores = model.score_modules(None, "weight_norm", progress=False)
    model.prune_modules(scores.select(strategy="role", keep=1))
    assert model.peft_config["ref"] is shared
    assert shared.to_dict() == before and before["rank_pattern"] == {"q_proj": 2}
    assert len(model.peft_config["default"].target_modules) == 3
