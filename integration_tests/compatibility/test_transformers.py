"""What users of transformers do with a model and its adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from accelerate.utils.modeling import get_state_dict_offloaded_model
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    PeftModel,
    get_peft_model,
)
from torch import nn

from integration_tests.helpers.models import (
    METHODS,
    TINY,
    VOCAB,
    adapted,
    config_of,
    generated,
    labelled,
    logits,
    randomize,
    saved_base,
    tiny,
    tokens,
)
from integration_tests.helpers.text import tokenizer


both = pytest.mark.parametrize("method", METHODS)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


class Rows(torch.utils.data.Dataset):
    """Sequences in which each token is the successor of the one before, with a prompt of three tokens."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(8) + 4 + index
        return {"input_ids": ids, "labels": labelled(ids[None], 3)[0]}


def trainer(model: nn.Module, folder: Path, **arguments: Any) -> tf.Trainer:
    fields = {"max_steps": 8, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "save_steps": 4}
    fields |= {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1, **arguments}
    return tf.Trainer(model, tf.TrainingArguments(str(folder), **fields), train_dataset=Rows(), eval_dataset=Rows())


@pytest.mark.support("transformers' `Trainer`: training, checkpoints, resuming")
@both
def test_trainer(method: str, tmp_path: Path) -> None:
    def fresh() -> PeftModel:
        torch.manual_seed(0)
        return get_peft_model(tiny("llama"), config_of(method))

    run = trainer(fresh(), tmp_path, gradient_checkpointing=True)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    loss = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < loss - 0.1
    own = ("lora_", "para_")
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) or any(prefix in name for prefix in own), name
    resumed = trainer(fresh(), tmp_path, gradient_checkpointing=True)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    close(logits(resumed.model.eval()), logits(run.model.eval()))


@pytest.mark.support('`pipeline("text-generation")`')
@both
def test_pipeline(method: str, tmp_path: Path) -> None:
    words = tokenizer()
    base = saved_base(tmp_path)
    words.save_pretrained(base)
    model = adapted(method, base=tf.AutoModelForCausalLM.from_pretrained(base))
    model.save_pretrained(tmp_path / "adapter")
    words.save_pretrained(tmp_path / "adapter")
    prompts = ["w7 w8 w9", "w20 w3"]
    arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}

    def texts(pipe: Any) -> list[str]:
        return [answer[0]["generated_text"] for answer in pipe(prompts, **arguments)]

    expected = []
    for prompt in prompts:
        ids = torch.tensor([words(prompt)["input_ids"]])
        answer = generated(model, ids, max_new_tokens=5, min_new_tokens=5)[0]
        # the pipeline puts the answer's text right behind the prompt's
        expected.append(prompt + words.decode(answer[len(ids[0]) :], skip_special_tokens=True))
    assert texts(tf.pipeline("text-generation", model, tokenizer=words)) == expected
    # the folder of an adapter, which transformers loads onto its base by itself
    assert texts(tf.pipeline("text-generation", str(tmp_path / "adapter"))) == expected
    padded = tf.pipeline("text-generation", model, tokenizer=words, batch_size=2)
    padded.tokenizer.padding_side = "left"
    assert texts(padded) == expected


@pytest.mark.support("transformers' `add_adapter`, `load_adapter`, `set_adapter`, `delete_adapter`")
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
@both
def test_adapters_on_a_transformers_model(method: str, architecture: str, tmp_path: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(saved_base(tmp_path, architecture))
    plain = logits(base)
    base.add_adapter(config_of(method), adapter_name="first")
    randomize(base, "first").eval()
    first = logits(base)
    assert not torch.allclose(first, plain)
    base.save_pretrained(tmp_path / "adapter")
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }
    base.add_adapter(config_of(method, r=3), adapter_name="second")
    randomize(base, "second", seed=5).eval()
    assert base.active_adapters() == ["second"]
    second = logits(base)
    assert not torch.allclose(first, second)
    base.set_adapter("first")
    close(logits(base), first)
    base.disable_adapters()
    assert torch.equal(logits(base), plain)
    base.enable_adapters()
    base.delete_adapter("second")
    base.set_adapter("first")
    close(logits(base), first)

    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    other.load_adapter(str(tmp_path / "adapter"), adapter_name="loaded")
    close(logits(other), first)
    # the adapter's folder names its base
    close(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")), first)
    # and PEFT reads what transformers wrote
    peft_model = PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    close(logits(peft_model.eval()), first)
    assert generated(other) == generated(peft_model)


AUTO = {
    "llama": (AutoPeftModelForCausalLM, "CAUSAL_LM"),
    "bert": (AutoPeftModelForSequenceClassification, "SEQ_CLS"),
    "t5": (AutoPeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"),
}


@pytest.mark.support("`AutoPeftModelFor…`")
@pytest.mark.parametrize("architecture", AUTO)
@both
def test_auto_peft_models(method: str, architecture: str, tmp_path: Path) -> None:
    auto, task_type = AUTO[architecture]
    base = type(tiny(architecture)).from_pretrained(saved_base(tmp_path, architecture))
    model = adapted(method, base=base, task_type=task_type)
    model.save_pretrained(tmp_path / "adapter")
    batch = {"input_ids": tokens(), "labels": tokens(2, 5)} if architecture == "t5" else {"input_ids": tokens()}
    expected = model(**batch).logits
    close(auto.from_pretrained(tmp_path / "adapter").eval()(**batch).logits, expected)
    low = auto.from_pretrained(tmp_path / "adapter", low_cpu_mem_usage=True)
    close(low.eval()(**batch).logits, expected)


@pytest.mark.support("`AutoPeftModelFor…`")
@both
def test_auto_peft_model_without_a_task_type(method: str, tmp_path: Path) -> None:
    base = tf.AutoModelForCausalLM.from_pretrained(saved_base(tmp_path)).model
    base.save_pretrained(tmp_path / "backbone")
    model = adapted(method, base=tf.AutoModel.from_pretrained(tmp_path / "backbone"), task_type=None)
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()
    close(loaded(input_ids=tokens()).last_hidden_state, model(input_ids=tokens()).last_hidden_state)


@pytest.mark.support("`device_map`, also with layers on disk")
@both
def test_device_map(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # PEFT writes the offloaded layers below the working directory
    folder = saved_base(tmp_path)
    model = adapted(method, base=tf.AutoModelForCausalLM.from_pretrained(folder))
    model.save_pretrained(tmp_path / "adapter")
    expected, answer = logits(model), generated(model)
    everything = tf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
    close(logits(PeftModel.from_pretrained(everything, tmp_path / "adapter").eval()), expected)
    names = ["model.embed_tokens", "model.layers.0", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head"]
    split = {**dict.fromkeys(names, "cpu"), "model.layers.1": "disk"}
    partly = tf.AutoModelForCausalLM.from_pretrained(folder, device_map=split, offload_folder=tmp_path / "offload")
    placed = {f"base_model.model.{name}": device for name, device in split.items()}
    loaded = PeftModel.from_pretrained(
        partly, tmp_path / "adapter", device_map=placed, offload_folder=str(tmp_path / "more")
    ).eval()
    assert any(parameter.is_meta for parameter in loaded.parameters())
    close(logits(loaded), expected)
    assert generated(loaded) == answer


@pytest.mark.support("`device_map`, with layers on disk: scores, pruning, saving")
@pytest.mark.parametrize("method", ["FanLoRA"])
@pytest.mark.parametrize(
    "away", [["model.layers.1"], ["model.embed_tokens", "lm_head"]], ids=["a block", "embeddings"]
)
def test_scores_and_pruning_with_layers_on_disk(
    method: str, away: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guards against weights, batches and gates that are read from, or moved to, the meta device."""
    monkeypatch.chdir(tmp_path)
    folder = saved_base(tmp_path)
    adapted(method).save_pretrained(tmp_path / "adapter")
    names = [*(f"model.layers.{block}" for block in range(3)), "model.embed_tokens", "model.norm", "lm_head"]
    split = {"model.rotary_emb": "cpu", **{name: "disk" if name in away else "cpu" for name in names}}
    whole = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    partly = PeftModel.from_pretrained(
        tf.AutoModelForCausalLM.from_pretrained(folder, device_map=split, offload_folder=tmp_path / "offload"),
        tmp_path / "adapter",
        device_map={f"base_model.model.{name}": device for name, device in split.items()},
        offload_folder=str(tmp_path / "more"),
    )
    assert any(parameter.is_meta for parameter in partly.parameters())
    batches = [TINY["llama"].batch()]
    for score in ("output_norm", "weight_norm", "path"):
        expected, found = (
            model.score_modules(batches, score, num_points=2, progress=False) for model in (whole, partly)
        )
        assert dict(found) == dict(expected)
    for model in (whole, partly):
        model.prune_modules(expected.select(keep=2))
    close(logits(partly.eval()), logits(whole.eval()))
    if any("lora_" in name and parameter.is_meta for name, parameter in partly.named_parameters()):
        with pytest.raises(ValueError, match="are offloaded"):
            partly.save_pretrained(tmp_path / "pruned")
        assert not (tmp_path / "pruned").exists()
    partly.save_pretrained(tmp_path / "pruned", state_dict=get_state_dict_offloaded_model(partly))
    loaded = PeftModel.from_pretrained(tf.AutoModelForCausalLM.from_pretrained(folder), tmp_path / "pruned")
    close(logits(loaded.eval()), logits(whole))


@pytest.mark.support("`dtype`, with and without `autocast_adapter_dtype`")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@both
def test_dtype(method: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = saved_base(tmp_path)
    model = adapted(method, base=tf.AutoModelForCausalLM.from_pretrained(folder))
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    for autocast in (True, False):
        low = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        loaded = PeftModel.from_pretrained(
            low, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=autocast
        )
        kinds = {p.dtype for name, p in loaded.named_parameters() if "lora_" in name or "para_" in name}
        assert kinds == {torch.float32 if autocast else dtype}
        found = logits(loaded.eval())
        assert found.dtype == dtype
        assert nn.functional.cosine_similarity(found.float().flatten(), expected.flatten(), 0) > 0.98
        assert len(generated(loaded)[0]) == tokens().shape[1] + 6
        trained = loaded.train()
        trained(input_ids=tokens(), labels=labelled(tokens())).loss.backward()


@pytest.mark.support("`low_cpu_mem_usage`")
@both
def test_low_cpu_mem_usage(method: str, tmp_path: Path) -> None:
    model = adapted(method)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path, low_cpu_mem_usage=True)
    assert loaded.load_adapter(tmp_path, adapter_name="again", low_cpu_mem_usage=True).missing_keys == []
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}
    for name in ("default", "again"):
        loaded.set_adapter(name)
        close(logits(loaded.eval()), logits(model))
    empty = get_peft_model(tiny("llama"), config_of(method), low_cpu_mem_usage=True)
    kinds = {p.device.type for name, p in empty.named_parameters() if "lora_" in name or "para_" in name}
    assert kinds == {"meta"}


def train_a_little(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):
        model.train()(input_ids=tokens(), labels=labelled(tokens())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.support("tied embeddings")
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@both
def test_tied_embeddings_stay_tied(method: str, architecture: str, tmp_path: Path) -> None:
    def base() -> nn.Module:
        return tiny(architecture, tie_word_embeddings=True)

    model = get_peft_model(base(), config_of(method))
    train_a_little(model)
    inner = model.get_base_model()
    assert inner.get_input_embeddings().weight is inner.get_output_embeddings().weight
    assert torch.equal(inner.get_input_embeddings().weight, base().get_input_embeddings().weight)
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(base(), tmp_path).eval()), logits(model))


@pytest.mark.support("new tokens, with `modules_to_save`")
@pytest.mark.parametrize("tied", [False, True])
@both
def test_a_larger_vocabulary_with_modules_to_save(method: str, tied: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = tiny("llama", tie_word_embeddings=tied)
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
        return model

    model = get_peft_model(base(), config_of(method, modules_to_save=["embed_tokens", "lm_head"]))
    before = base().get_input_embeddings().weight
    train_a_little(model)
    assert not torch.equal(
        model.get_base_model().get_input_embeddings().modules_to_save["default"].weight[tokens()], before[tokens()]
    )
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    new = torch.full((2, 3), VOCAB + 2)
    batch = torch.cat((tokens(), new), 1)
    close(logits(loaded, batch), logits(model, batch))
    assert generated(loaded, batch) == generated(model, batch)


@pytest.mark.support("new tokens, with `trainable_token_indices`")
@pytest.mark.parametrize("tied", [False, True])
@both
def test_a_larger_vocabulary_with_trainable_tokens(method: str, tied: bool, tmp_path: Path) -> None:
    def base() -> nn.Module:
        model = tiny("llama", tie_word_embeddings=tied)
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB + 7, mean_resizing=False)
        return model

    new = list(range(VOCAB, VOCAB + 7))
    batch = torch.cat((tokens(), torch.full((2, 3), VOCAB + 2)), 1)
    model = get_peft_model(base(), config_of(method, trainable_token_indices=new))
    fresh = logits(model.eval(), batch)
    assert torch.equal(fresh, logits(base(), batch))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()(input_ids=batch, labels=labelled(batch)).loss.backward()
    optimizer.step()
    randomize(model.eval())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    close(logits(loaded, batch), logits(model, batch))
    delta = [p for name, p in model.named_parameters() if "token_adapter" in name and p.requires_grad]
    assert delta and not torch.equal(delta[0], base().get_input_embeddings().weight[VOCAB:])
    assert generated(loaded, batch) == generated(model, batch)
    assert torch.equal(logits(model.unload(), batch), fresh)


@pytest.mark.support("several adapters in one batch, each with trained tokens")
@both
def test_a_mixed_batch_reads_each_rows_trained_tokens(method: str) -> None:
    model = get_peft_model(tiny("llama"), config_of(method, trainable_token_indices=[5, 6]))
    model.add_adapter("second", config_of(method, r=3, trainable_token_indices=[6]))
    randomize(randomize(model), "second", seed=7).eval()
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += 1.0
    batch = tokens()
    batch[:, 2:4] = torch.tensor([5, 6])
    alone = []
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        alone.append(logits(model, batch)[row])
    with torch.no_grad():
        mixed = model(input_ids=batch, adapter_names=["default", "second"]).logits
    close(mixed, torch.stack(alone))
