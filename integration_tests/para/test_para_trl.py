"""TRL's SFTTrainer with its defaults, on every kind of data: gradients see the prompt, and plain text raises."""

import itertools

import pytest
import torch
import transformers as tf
from para_models import LLAMA, tiny
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_fanlora import ParaConfig, prompt_end_token_ids_of


trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<s>assistant {% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}<s>{{ m.role }} {{ m.content }} </s>{% endif %}{% endfor %}{% if add_generation_prompt %}<s>assistant {% endif %}"
)


@pytest.fixture
def tokenizer():
    words = ["<pad>", "<unk>", "</s>", "<s>", "user", "assistant", "system"] + [f"w{i}" for i in range(60)]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<s>", "</s>"])
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )


def text(seed: int, length: int) -> str:
    return " ".join(
        f"w{i}" for i in torch.randint(0, 60, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    )


def prompt_completion():
    return [{"prompt": text(i, 3 + i % 4), "completion": " " + text(100 + i, 2 + i % 3)} for i in range(8)]


def conversations():
    return [
        {
            "messages": [
                {"role": "user", "content": text(i, 3 + i % 3)},
                {"role": "assistant", "content": text(50 + i, 3)},
                {"role": "user", "content": text(20 + i, 2)},
                {"role": "assistant", "content": text(70 + i, 2)},
            ]
        }
        for i in range(8)
    ]


def trainer(tokenizer, rows, tmp_path, config=None, compute_loss_func=None, evaluate=False, **arguments):
    arguments = {
        "output_dir": str(tmp_path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "learning_rate": 0.01,
        **arguments,
    }
    dataset = datasets.Dataset.from_list(rows)
    return trl.SFTTrainer(
        tiny("llama"),
        args=trl.SFTConfig(**arguments),
        train_dataset=dataset,
        eval_dataset=dataset if evaluate else None,
        processing_class=tokenizer,
        peft_config=config or ParaConfig(r=4),
        compute_loss_func=compute_loss_func,
    )


def up_norms(model) -> list:
    return [p.detach().abs().max().item() for name, p in model.named_parameters() if ".up_" in name]


@pytest.mark.support("TRL's SFTTrainer")
@pytest.mark.parametrize(
    ("rows", "arguments"),
    [
        (prompt_completion, {}),
        (prompt_completion, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}),
        (prompt_completion, {"packing": True, "max_length": 24}),
        (prompt_completion, {"padding_free": True, "max_length": None}),
        (conversations, {"assistant_only_loss": True}),
        (conversations, {"assistant_only_loss": True, "packing": True, "max_length": 48}),
    ],
    ids=["defaults", "reentrant", "packing", "padding free", "assistant only", "assistant only, packed"],
)
def test_sft_trainer(tokenizer, tmp_path, rows, arguments):
    run = trainer(tokenizer, rows(), tmp_path, **arguments)
    assert run.args.gradient_checkpointing, "the default that this test is about"
    run.train()
    assert all(norm > 0 for norm in up_norms(run.model))
    run.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_config.json").exists()


def test_the_loss_under_the_trainer_is_the_plain_models(tokenizer, tmp_path):
    """Guards against a prompt that differs between the trainer's checkpointed, packed step and a plain forward."""
    torch.manual_seed(0)
    config = ParaConfig(r=4, init_para_weights=False)
    packed = trainer(tokenizer, prompt_completion(), tmp_path, config, padding_free=True, max_length=None)
    batch = next(iter(packed.get_train_dataloader()))
    model = packed.model.train()
    packed_loss = model(**batch, use_cache=False).loss
    positions, labels, ids = batch["position_ids"][0], batch["labels"][0], batch["input_ids"][0]
    starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
    total, count = 0.0, 0
    for start, end in itertools.pairwise(starts):
        own = labels[start:end][None]
        loss = model(input_ids=ids[start:end][None], labels=own, use_cache=False).loss
        supervised = int((own[:, 1:] != -100).sum())
        total, count = total + loss * supervised, count + supervised
    torch.testing.assert_close(packed_loss, total / count, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [{}, {"packing": True, "max_length": 24}, {"padding_free": True, "max_length": None}]
)
def test_plain_text_raises_what_helps(tokenizer, tmp_path, arguments):
    rows = [{"text": text(i, 9)} for i in range(8)]
    with pytest.raises(ValueError, match=r"prompt_mask.*prompt_end_token_ids_of\(tokenizer\).*prompt-completion"):
        trainer(tokenizer, rows, tmp_path, **arguments).train()


def ignoring_labels(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().logsumexp(-1).mean()


@pytest.mark.parametrize("arguments", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": ignoring_labels}])
def test_without_labels_the_prompts_end_is_needed(tokenizer, tmp_path, arguments):
    """Label smoothing and custom losses take the labels away before the model is called."""
    with pytest.raises(ValueError, match="the call has no labels"):
        trainer(tokenizer, conversations(), tmp_path, assistant_only_loss=True, **arguments).train()
    config = ParaConfig(r=4, prompt_end_token_ids=prompt_end_token_ids_of(tokenizer))
    run = trainer(tokenizer, conversations(), tmp_path, config, assistant_only_loss=True, **arguments)
    run.train()
    assert all(norm > 0 for norm in up_norms(run.model))


def test_evaluation_between_steps(tokenizer, tmp_path):
    run = trainer(tokenizer, prompt_completion(), tmp_path, evaluate=True, eval_strategy="steps", eval_steps=1)
    run.train()
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 2
    assert LLAMA["num_hidden_layers"] == 2
