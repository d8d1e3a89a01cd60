"""What PEFT's users do with adapters: saving, loading, switching, mixing, removing."""

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers as tf
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from integration_tests.helpers.models import GREEDY, LLAMA, generate, leading, logits, para, randomize, tiny, tokens
from integration_tests.helpers.processes import OtherProcess
from peft_fanlora import ParaConfig
from peft_fanlora.para.layer import ParaLayer


pytestmark = pytest.mark.xdist_group("model")  # one worker makes what its tests share


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def two_adapters(**second):
    model = para()
    model.add_adapter("second", ParaConfig(**{"r": 3, "pooling": "mean", **second}))
    return randomize(model, "second", seed=7).eval()


def logits_of(model, batch, adapter):
    model.set_adapter(adapter)
    return model(batch).logits.detach()


@pytest.fixture(scope="module")
def other_process() -> Iterator[OtherProcess]:
    with OtherProcess("import peft_fanlora") as process:
        yield process


@pytest.mark.support("saving and loading")
@pytest.mark.parametrize("pooling", ["attention", "mean"])
@pytest.mark.parametrize("activation", ["gelu", "rational"])
def test_saved_and_loaded_in_another_process(tmp_path, pooling, activation, other_process):
    model = para(pooling=pooling, activation=activation, prompt_end_token_ids=[7])
    tiny("llama").save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    batch = tokens()
    found = other_process.logits(tf.LlamaForCausalLM, tmp_path / "base", tmp_path / "adapter", {"input_ids": batch})
    close(found, logits(model, batch))
    assert ParaConfig.from_pretrained(tmp_path / "adapter").prompt_end_token_ids == [7]


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_beside_another_adapter(tmp_path, low_cpu_mem_usage):
    model = two_adapters()
    batch = tokens()
    expected = {name: logits_of(model, batch, name) for name in ("default", "second")}
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["second"]
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.load_adapter(tmp_path / "second", "other name", low_cpu_mem_usage=low_cpu_mem_usage)
    loaded.eval()
    close(loaded(batch).logits, expected["default"])
    close(logits_of(loaded, batch, "other name"), expected["second"])


def test_auto_peft_model(tmp_path):
    tiny("llama").save_pretrained(tmp_path / "base")
    base = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = randomize(get_peft_model(base, ParaConfig(r=4, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    close(loaded(tokens()).logits, model(tokens()).logits)


def test_only_the_adapter_is_saved(tmp_path):
    model = para()
    keys = get_peft_model_state_dict(model).keys()
    assert len(keys) == 3 * 5
    assert "base_model.model.model.layers.0.self_attn.q_proj.para_generator.down" in keys
    assert "base_model.model.model.layers.1.self_attn.q_proj.para_generator.up_mlp_up_proj" in keys


@pytest.mark.parametrize("name", ["down", "up", "default", "query", "para_generator"])
def test_any_adapter_name_survives_saving(tmp_path, name):
    model = randomize(
        get_peft_model(tiny("llama"), ParaConfig(r=4, task_type="CAUSAL_LM"), adapter_name=name), name
    ).eval()
    model.save_pretrained(tmp_path)
    folder = tmp_path if name == "default" else tmp_path / name
    close(PeftModel.from_pretrained(tiny("llama"), folder).eval()(tokens()).logits, model(tokens()).logits)


@pytest.mark.support("switching, disabling and deleting adapters")
def test_switching_disabling_and_deleting():
    model = two_adapters()
    batch = tokens()
    base = tiny("llama")(batch).logits
    first, second = logits_of(model, batch, "default"), logits_of(model, batch, "second")
    assert (first - second).abs().max() > 1e-3 and (first - base).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(model(batch).logits, base)
    close(model(batch).logits, second)
    model.delete_adapter("second")
    assert "second" not in "".join(model.state_dict())
    model.set_adapter("default")
    close(model(batch).logits, first)
    with pytest.raises(ValueError, match="second"):
        model.set_adapter("second")
    without = model.get_base_model()
    model.delete_adapter("default")
    close(without(batch).logits, base)
    without.train()(batch, labels=batch)


@pytest.mark.support("several active adapters")
def test_several_active_adapters_multiply():
    model = two_adapters(pooling="max", activation="silu")
    batch = tokens()
    layers = [layer for layer in model.modules() if isinstance(layer, ParaLayer)]
    seen = {}

    def vectors():
        cache = model(batch, use_cache=True).past_key_values
        return {layer.name: cache.para_vectors.vectors[layer.name] for layer in layers[:2]}

    for adapter in ("default", "second"):
        model.set_adapter(adapter)
        seen[adapter] = vectors()
    model.base_model.set_adapter(["default", "second"])
    for name, vector in vectors().items():
        close(vector, seen["default"][name] * seen["second"][name])


@pytest.mark.support("several adapters in one batch (`adapter_names`)")
@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_a_mixed_batch_gives_each_row_what_its_adapter_alone_would(beams):
    model = two_adapters()
    batch = tokens(4, 6)
    names = ["default", "__base__", "second", "default"]
    mixed = generate(model, batch, adapter_names=names, num_beams=beams)
    forward = model(batch, adapter_names=names).logits
    for row, name in enumerate(names):
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                alone, logits = (
                    generate(model, batch[row : row + 1], num_beams=beams),
                    model(batch[row : row + 1]).logits,
                )
        else:
            alone, logits = generate(model, batch[row : row + 1], num_beams=beams), model(batch[row : row + 1]).logits
        assert mixed.sequences[row].tolist() == alone.sequences[0].tolist(), name
        close(forward[row : row + 1], logits)
    model.set_adapter("default")
    close(model(batch).logits[3:], forward[3:])


@torch.no_grad()
def test_mixed_batches_step_by_step():
    model = two_adapters()
    batch, rest = tokens(2, 6), tokens(2, 2, seed=4)
    names = ["second", "__base__"]
    cache = model(batch, adapter_names=names, use_cache=True).past_key_values
    steps = [
        model(rest[:, :1], adapter_names=names, past_key_values=cache).logits,
        model(rest[:, 1:], past_key_values=cache).logits,
    ]
    whole = torch.cat((batch, rest), 1)
    close(torch.cat(steps, 1), model(whole, adapter_names=names, prompt_mask=leading(whole, 6)).logits[:, 6:])
    with pytest.raises(ValueError, match=r"filled with the adapters \['second', '__base__'\]"):
        model(rest[:, :1], adapter_names=["second", "second"], past_key_values=cache)


def test_all_linear_finds_the_same_layers_for_a_further_adapter():
    """PEFT goes by the names of adapted layers' classes, and took none of these for linear."""
    first, second = (ParaConfig(r=2, target_modules="all-linear") for _ in range(2))
    model = get_peft_model(tiny("llama"), first)
    model.add_adapter("second", second)
    assert second.target_modules == first.target_modules
    model.add_adapter("third", ParaConfig(r=2))


def test_names_are_counted_in_a_model_of_any_kind():
    """A model without token ids took any number of names, and gave rows the adapters of other rows."""
    base = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    model = get_peft_model(base, ParaConfig(r=2, target_modules=["0"], init_para_weights=False)).eval()
    rows = torch.ones(3, 4)
    assert model(rows, adapter_names=["default", "__base__", "default"]).shape == (3, 2)
    for names in (["default"] * 2, ["__base__"] * 4):
        with pytest.raises(ValueError, match=f"number of inputs, but got {len(names)} and 3"):
            model(rows, adapter_names=names)


def test_mixed_batch_errors():
    """Guards against unknown names that silently mean the base model, and against names that stay after an error."""
    model = two_adapters()
    batch = tokens()
    expected = model(batch).logits
    with pytest.raises(
        ValueError, match=r"non-existing adapter\(s\): thrid. The adapters are \['default', 'second'\]"
    ):
        model(batch, adapter_names=["thrid", "second"])
    with pytest.raises(ValueError, match="number of inputs, but got 3 and 2"):
        model(batch, adapter_names=["second"] * 3)
    with pytest.raises(ValueError, match="number of inputs, but got 1 and 2"):
        model(batch, adapter_names=["second"])
    with pytest.raises(IndexError):
        model(batch + 10_000, adapter_names=["second", "second"])
    close(model(batch).logits, expected)
    with pytest.raises(ValueError, match="in training mode"):
        model.train()(batch, adapter_names=["second", "second"])


@torch.no_grad()
def test_adapters_with_prompts_that_end_differently():
    model = two_adapters(prompt_end_token_ids=[63])
    batch = tokens().clamp(max=60)
    batch[:, 3] = 63
    with_end = logits_of(model, batch, "second")
    close(with_end, model(batch, prompt_mask=leading(batch, 4)).logits)
    mixed = model(batch, adapter_names=["default", "second"]).logits
    close(mixed[1:], with_end[1:])
    close(mixed[:1], logits_of(model, batch, "default")[:1])


def test_adapters_on_different_modules():
    """Guards against an adapter whose vectors depend on what else is in the model.

    The second adapter's generator lives in another layer than the first's, and reads that layer's input.
    """
    model = two_adapters(target_modules=["up_proj"])
    batch = tokens()
    second = logits_of(model, batch, "second")
    alone = get_peft_model(tiny("llama"), ParaConfig(r=3, pooling="mean", target_modules=["up_proj"])).eval()
    set_peft_model_state_dict(alone, get_peft_model_state_dict(model, adapter_name="second"))
    close(second, alone(batch).logits)
    model.delete_adapter("default")
    model.set_adapter("second")
    close(model(batch).logits, second)


@pytest.mark.support("merging", refused=True)
@pytest.mark.parametrize(
    "merge",
    [
        lambda model: model.merge_adapter(),
        lambda model: model.merge_and_unload(),
        lambda model: next(layer for layer in model.modules() if isinstance(layer, ParaLayer)).merge(),
    ],
)
def test_merging_is_refused_and_changes_nothing(merge):
    model = para()
    expected = model(tokens()).logits
    with pytest.raises(NotImplementedError, match=r"depend on the prompt.*unload\(\)"):
        merge(model)
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.support("`unload`")
def test_unload_leaves_the_base_model_as_it_was():
    base = tiny("llama")
    expected, keys = base(tokens()).logits, sorted(base.state_dict())
    base.gradient_checkpointing_enable()
    before = {name: sorted(module.__dict__) for name, module in base.named_modules()}
    model = randomize(get_peft_model(base, ParaConfig(task_type="CAUSAL_LM")))
    labels = tokens()
    labels[:, :3] = -100
    model.train()(tokens(), labels=labels)
    unloaded = model.unload().eval()
    assert sorted(unloaded.state_dict()) == keys
    assert {name: sorted(module.__dict__) for name, module in unloaded.named_modules()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in unloaded.model.layers.modules())
    assert not unloaded._forward_pre_hooks and not unloaded._forward_hooks
    assert torch.equal(unloaded(tokens()).logits, expected)


@pytest.mark.support("no `task_type`")
@torch.no_grad()
def test_without_a_task_type():
    """Guards against work done in the tuner's `forward`, which PEFT leaves out where a config has no task type."""
    model, plain = para(task_type="CAUSAL_LM"), para(task_type=None)
    close(plain(tokens()).logits, model(tokens()).logits)
    generated = plain.generate(tokens(), attention_mask=torch.ones(2, 7), max_new_tokens=5, min_new_tokens=5, **GREEDY)
    assert generated.sequences.tolist() == generate(model, tokens(), new=5).sequences.tolist()


@pytest.mark.support("`inject_adapter_in_model`")
@torch.no_grad()
def test_injection_without_a_tuner():
    expected = generate(para(), tokens())
    model = randomize(inject_adapter_in_model(ParaConfig(r=4), tiny("llama"))).eval()
    generated = generate(model, tokens())
    close(torch.stack(generated.logits, 1), torch.stack(expected.logits, 1))
    model = randomize(inject_adapter_in_model(ParaConfig(r=2), model, "more"), "more").eval()
    layers = [layer for layer in model.modules() if isinstance(layer, ParaLayer)]
    assert len({id(layer.block.blocks) for layer in layers}) == 1
    state = get_peft_model_state_dict(para(), adapter_name="default")
    result = set_peft_model_state_dict(model, state, "default")
    assert not result.unexpected_keys


@torch.no_grad()
@pytest.mark.support("transformers' `add_adapter`")
def test_transformers_add_adapter(tmp_path):
    expected = generate(para(), tokens())
    model = tiny("llama")
    model.add_adapter(ParaConfig(r=4), "mine")
    randomize(model, "mine").eval()
    close(torch.stack(generate(model, tokens()).logits, 1), torch.stack(expected.logits, 1))
    model.save_pretrained(tmp_path)
    loaded = tiny("llama")
    loaded.load_adapter(str(tmp_path))
    close(loaded.eval()(tokens()).logits, model(tokens()).logits)
    model.disable_adapters()
    close(model(tokens()).logits, tiny("llama")(tokens()).logits)
    model.enable_adapters()
    model.add_adapter(ParaConfig(r=2), "second")
    model.set_adapter("mine")
    close(torch.stack(generate(model, tokens()).logits, 1), torch.stack(expected.logits, 1))
    model.delete_adapter("mine")


@pytest.mark.support("`modules_to_save`")
def test_modules_to_save(tmp_path):
    torch.manual_seed(0)
    base = tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA, num_labels=3))
    twin = copy.deepcopy(base)
    model = randomize(get_peft_model(base, ParaConfig(task_type="SEQ_CLS", modules_to_save=["score"])))
    labels = torch.tensor([0, 2])
    model.train()(tokens(), labels=labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any("score" in name for name in trained) and all("score" in n or "para_" in n for n in trained)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "score.modules_to_save" in name:
                p.add_(1.0)
    model.eval().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(twin, tmp_path).eval()
    close(loaded(tokens()).logits, model(tokens()).logits)
    mixed = model(tokens(), adapter_names=["__base__", "default"]).logits
    close(mixed[1:], model(tokens()).logits[1:])


def test_a_failed_call_changes_nothing():
    """Guards against half-wrapped models, and against configs of adapters that were never added."""
    base = tiny("llama")
    expected = base(tokens()).logits
    with pytest.raises(TypeError, match=r"scales the output of linear layers, and Embedding is not one"):
        get_peft_model(base, ParaConfig(target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ValueError, match="nowhere"):
        get_peft_model(base, ParaConfig(target_modules=["nowhere"]))
    assert not any(isinstance(module, ParaLayer) for module in base.modules())
    assert not base._forward_pre_hooks
    assert torch.equal(base(tokens()).logits, expected)

    model = para()
    expected = model(tokens()).logits
    for config in (ParaConfig(target_modules=["q_proj", "embed_tokens"]), ParaConfig(target_modules=["nowhere"])):
        with pytest.raises((TypeError, ValueError)):
            model.add_adapter("broken", config)
        assert list(model.peft_config) == ["default"]
        with pytest.raises((TypeError, ValueError)):
            inject_adapter_in_model(config, model.get_base_model(), "broken")
        assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="contains a dot"):
        model.add_adapter("a.b", ParaConfig())
    assert torch.equal(model(tokens()).logits, expected)


@pytest.mark.support("bitsandbytes, 4 and 8 bit")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.usefixtures("exact_bitsandbytes")
@torch.no_grad()
def test_bitsandbytes(bits):
    bnb = pytest.importorskip("bitsandbytes")
    wide = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}

    def quantised():
        model = tiny("llama", **wide)
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                new = (
                    bnb.nn.Linear4bit(
                        module.in_features,
                        module.out_features,
                        bias=False,
                        compute_dtype=torch.float32,
                        quant_type="nf4",
                    )
                    if bits == 4
                    else bnb.nn.Linear8bitLt(
                        module.in_features, module.out_features, bias=False, has_fp16_weights=False
                    )
                )
                new.load_state_dict(module.state_dict())
                parent = model.get_submodule(name.rpartition(".")[0])
                setattr(parent, name.rpartition(".")[2], new.to("cpu"))
        setattr(model, f"is_loaded_in_{bits}bit", True)
        return model.eval()

    base = quantised()
    expected = base(tokens()).logits
    model = get_peft_model(base, ParaConfig(r=4, task_type="CAUSAL_LM")).eval()
    close(model(tokens()).logits, expected)
    randomize(model)
    assert (model(tokens()).logits - expected).abs().max() > 1e-3
    generated = generate(model, tokens())
    forced = model(generated.sequences, prompt_mask=leading(generated.sequences, 7)).logits[:, 6:-1]
    tolerance = 1e-4 if bits == 4 else 0.3  # eight bits quantise activations by what else is in the batch
    torch.testing.assert_close(torch.stack(generated.logits, 1), forced, atol=tolerance, rtol=tolerance)
    with torch.enable_grad():
        labels = tokens()
        labels[:, :3] = -100
        model.train()(tokens(), labels=labels).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
