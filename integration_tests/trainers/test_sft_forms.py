"""SFTTrainer on every form of data that TRL documents: the adapter alone learns, and no vector sees an answer."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from integration_tests.helpers.models import METHODS
from integration_tests.helpers.text import tokenizer
from integration_tests.helpers.training import (
    END_OF_PROMPT,
    END_OF_TURN,
    adapted,
    answer,
    arguments,
    assistant,
    base,
    check_no_leak,
    check_only_the_adapter_moved,
    check_resumes,
    check_saved,
    config,
    forward,
    losses,
    question,
    rows,
    snapshot,
    user,
)


@dataclass(frozen=True)
class Form:
    """One form of data, and what it takes to train on it.

    Attributes:
        feature: its name in the support table.
        make: a row of it.
        options: fields of SFTConfig.
        end: the token ids that end a prompt, for PARA, where the labels do not show it.
        formatting_func: the trainer's argument of this name.
    """

    feature: str
    make: Callable[[int], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    end: list[int] | None = None
    formatting_func: Callable[[dict[str, Any]], str] | None = None


def text(row: int) -> dict[str, Any]:
    return {"text": f"{question(row)} answer {answer(row)}"}


def messages(row: int) -> dict[str, Any]:
    return {"messages": user(question(row)) + assistant(answer(row)) + user(question(row + 1)) + assistant(answer(2))}


def tool_calling(row: int) -> dict[str, Any]:
    """The answer takes a call of a tool first, and is what the tool says."""
    function = {"name": f"w{40 + row % 3}", "arguments": {}}
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}
    result = {"role": "tool", "name": function["name"], "content": question(row + 1)}
    tool = {"name": function["name"], "parameters": {"type": "object", "properties": {}}}
    return {
        "messages": [*user(question(row)), call, result, *assistant(answer(row))],
        "tools": [{"type": "function", "function": tool}],
    }


def sharegpt(row: int) -> dict[str, Any]:
    return {"conversations": [{"from": "user", "value": question(row)}, {"from": "assistant", "value": answer(row)}]}


def prompt_completion(row: int) -> dict[str, Any]:
    return {"prompt": question(row), "completion": f" {answer(row)}"}


def marked_prompt_completion(row: int) -> dict[str, Any]:
    return {"prompt": f"{question(row)} answer", "completion": f" {answer(row)}"}


def conversational_prompt_completion(row: int) -> dict[str, Any]:
    return {"prompt": user(question(row)), "completion": assistant(answer(row))}


def tokenized(row: int) -> dict[str, Any]:
    return {"input_ids": tokenizer()(text(row)["text"])["input_ids"]}


def tokenized_with_mask(row: int) -> dict[str, Any]:
    ids = tokenized(row)["input_ids"]
    start = ids.index(END_OF_PROMPT[0]) + 1
    return {"input_ids": ids, "completion_mask": [0] * start + [1] * (len(ids) - start)}


def tokenized_with_labels(row: int) -> dict[str, Any]:
    ids = tokenized(row)["input_ids"]
    start = ids.index(END_OF_PROMPT[0]) + 1
    return {"input_ids": ids, "labels": [-100] * start + ids[start:]}


PACKED = {"packing": True, "max_length": 24}
FLAT = {"padding_free": True, "max_length": None}
FORMS = [
    Form("SFT, text", text, end=END_OF_PROMPT),
    Form("SFT, text, packed", text, PACKED, END_OF_PROMPT),
    Form("SFT, text, padding-free", text, FLAT, END_OF_PROMPT),
    Form("SFT, messages", messages, end=END_OF_TURN),
    Form("SFT, messages, assistant_only_loss", messages, {"assistant_only_loss": True}),
    Form("SFT, messages, assistant_only_loss, packed", messages, {"assistant_only_loss": True, **PACKED}),
    Form("SFT, tool calling", tool_calling, {"assistant_only_loss": True}),
    Form("SFT, ShareGPT conversations", sharegpt, end=END_OF_TURN),
    Form("SFT, prompt-completion", prompt_completion),
    Form("SFT, prompt-completion, packed", prompt_completion, PACKED),
    Form(
        "SFT, prompt-completion, packed (bfd_split)",
        prompt_completion,
        {**PACKED, "packing_strategy": "bfd_split"},
    ),
    Form("SFT, prompt-completion, padding-free", prompt_completion, FLAT),
    Form(
        "SFT, prompt-completion, completion_only_loss=False",
        marked_prompt_completion,
        {"completion_only_loss": False},
        END_OF_PROMPT,
    ),
    Form("SFT, conversational prompt-completion", conversational_prompt_completion),
    Form("SFT, pretokenised", tokenized, end=END_OF_PROMPT),
    Form("SFT, pretokenised, completion_mask", tokenized_with_mask, {"completion_only_loss": True}),
    Form("SFT, pretokenised, labels", tokenized_with_labels),
    Form(
        "SFT, formatting_func",
        lambda row: {"q": question(row), "a": answer(row)},
        end=END_OF_PROMPT,
        formatting_func=lambda example: f"{example['q']} answer {example['a']}",
    ),
    Form("SFT, loss_type dft", prompt_completion, {"loss_type": "dft"}),
    Form(
        "SFT, label smoothing",
        marked_prompt_completion,
        {"label_smoothing_factor": 0.1},
        END_OF_PROMPT,
    ),
    Form("SFT, NEFTune", prompt_completion, {"neftune_noise_alpha": 0.1}),
    Form(
        "SFT, reentrant checkpointing", prompt_completion, {"gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    Form("SFT, without checkpointing", prompt_completion, {"gradient_checkpointing": False}),
]


def trainer(method: str, form: Form, folder: Path, *, end: bool = True, **options: Any) -> SFTTrainer:
    torch.manual_seed(0)
    return SFTTrainer(
        base(),
        args=SFTConfig(**arguments(folder, **{"seed": 1, **form.options, **options})),
        train_dataset=rows(form.make),
        processing_class=tokenizer(),
        peft_config=config(method, task_type="CAUSAL_LM", prompt_end_token_ids=form.end if end else None),
        formatting_func=form.formatting_func,
    )


def cases() -> list[Any]:
    return [
        pytest.param(method, form, marks=pytest.mark.support(form.feature), id=f"{form.feature}-{method}")
        for form in FORMS
        for method in METHODS
    ]


def prompts_of(form: Form, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens are a prompt, found token by token: up to the end's tokens, or to the first label."""
    ids, labels = batch["input_ids"], batch["labels"]
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for row in range(len(ids)):
        in_prompt = True
        for position in range(ids.shape[1]):
            if "position_ids" in batch and batch["position_ids"][row, position] == 0:
                in_prompt = True
            if form.end is None and labels[row, position] != -100:
                in_prompt = False
            mask[row, position] = in_prompt
            if form.end is not None and ids[row, : position + 1].tolist()[-len(form.end) :] == form.end:
                in_prompt = False
    return mask & batch.get("attention_mask", torch.ones_like(ids)).bool()


@pytest.mark.parametrize(("method", "form"), cases())
def test_every_form_of_data(method: str, form: Form, tmp_path: Path) -> None:
    run = trainer(method, form, tmp_path, max_steps=12)
    before = snapshot(run.model)
    batch = next(iter(run.get_train_dataloader()))
    loss = forward(run.model, batch).loss
    run.train()
    check_only_the_adapter_moved(run.model, before)
    assert forward(run.model, batch).loss < loss - 0.1  # nats a token
    check_saved(run, tmp_path / "saved", base())
    if method == "PARA":
        check_no_leak(run.model, batch, prompts_of(form, batch))


@pytest.mark.parametrize(
    ("method", "form"),
    [
        pytest.param("PARA", form, marks=pytest.mark.support(f"{form.feature}, end unknown", refused=True))
        for form in FORMS
        if form.end is not None
    ],
    ids=[form.feature for form in FORMS if form.end is not None],
)
def test_where_nothing_shows_the_prompt_training_raises(method: str, form: Form, tmp_path: Path) -> None:
    """Guards against a silent fallback to "everything is prompt", which would train on leaked answers."""
    with pytest.raises(ValueError, match=r"prompt_mask.*get_prompt_end_token_ids\(tokenizer\).*prompt-completion"):
        trainer(method, form, tmp_path, end=False).train()


@pytest.mark.support("SFT, packed (wrapped)")
@pytest.mark.parametrize("method", ["FanLoRA"])
def test_wrapped_packing(method: str, tmp_path: Path) -> None:
    form = Form("", prompt_completion, {"packing": True, "packing_strategy": "wrapped", "max_length": 16})
    run = trainer(method, form, tmp_path, max_steps=12)
    run.train()
    found = losses(run)
    assert sum(found[-4:]) < sum(found[:4]) * 0.97, found


@pytest.mark.support("SFT, packed (wrapped)", refused=True)
@pytest.mark.parametrize("method", ["PARA"])
def test_wrapped_packing_hides_where_rows_begin(method: str, tmp_path: Path) -> None:
    """It cuts anywhere, so that some row begins in an answer: that row has no prompt."""
    form = Form("", prompt_completion, {"packing": True, "packing_strategy": "wrapped", "max_length": 16})
    with pytest.raises(ValueError, match="cannot tell where the prompt ends"):
        trainer(method, form, tmp_path).train()


@pytest.mark.support("SFT, resume from a checkpoint")
@pytest.mark.parametrize("method", METHODS)
def test_resuming(method: str, tmp_path: Path) -> None:
    form = Form("", prompt_completion, {"save_strategy": "steps", "save_steps": 2, "max_steps": 4})
    check_resumes(lambda folder: trainer(method, form, folder), tmp_path, 2)


def scaled_logits(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
    return outputs.logits.float().logsumexp(-1).mean()


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.support("SFT, custom loss function")
@pytest.mark.parametrize("method", METHODS)
def test_a_custom_loss_function(method: str, tmp_path: Path) -> None:
    def make(end: list[int] | None) -> SFTTrainer:
        return SFTTrainer(
            adapted(method, prompt_end_token_ids=end),
            args=SFTConfig(**arguments(tmp_path, max_steps=3)),
            train_dataset=rows(marked_prompt_completion),
            processing_class=tokenizer(),
            compute_loss_func=scaled_logits,
        )

    run = make(END_OF_PROMPT)
    before = snapshot(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)
    if method == "PARA":
        with pytest.raises(ValueError, match="the call has no labels"):
            make(None).train()


@pytest.mark.support("SFT, streamed dataset")
@pytest.mark.parametrize("method", METHODS)
def test_a_streamed_dataset(method: str, tmp_path: Path) -> None:
    streamed = Dataset.from_list([prompt_completion(row) for row in range(16)]).to_iterable_dataset()
    run = SFTTrainer(
        adapted(method),
        args=SFTConfig(**arguments(tmp_path, max_steps=3)),
        train_dataset=streamed,
        processing_class=tokenizer(),
    )
    before = snapshot(run.model)
    run.train()
    check_only_the_adapter_moved(run.model, before)


@pytest.mark.support("SFT, evaluation between steps")
@pytest.mark.parametrize("method", METHODS)
def test_evaluation_between_steps(method: str, tmp_path: Path) -> None:
    data = rows(prompt_completion)
    run = SFTTrainer(
        adapted(method),
        args=SFTConfig(**arguments(tmp_path, max_steps=2, eval_strategy="steps", eval_steps=1)),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
    )
    run.train()
    evaluated = [entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry]
    assert len(evaluated) == 2 and evaluated[1] < evaluated[0]


@pytest.mark.support("SFT, prompt-completion, padding-free")
@pytest.mark.parametrize("method", METHODS)
def test_the_loss_of_a_flattened_batch_is_that_of_its_rows(method: str, tmp_path: Path) -> None:
    """Guards against a prompt that differs between the trainer's checkpointed, packed step and a plain forward."""
    form = Form("", prompt_completion, FLAT)
    run = trainer(method, form, tmp_path, max_steps=4)
    run.train()
    batch = next(iter(run.get_train_dataloader()))
    model = run.model.train()
    together = model(**batch, use_cache=False).loss
    starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), batch["input_ids"].shape[1]]
    total, count = 0.0, 0
    for start, end in itertools.pairwise(starts):
        ids, labels = batch["input_ids"][:, start:end], batch["labels"][:, start:end]
        supervised = int((labels[:, 1:] != -100).sum())
        total, count = total + model(ids, labels=labels, use_cache=False).loss * supervised, count + supervised
    assert len(starts) == 5
    torch.testing.assert_close(together, total / count, atol=1e-5, rtol=1e-5)
