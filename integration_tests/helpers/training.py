"""What the tests of TRL's trainers share: tiny models with an adapter, a tokenizer, data in TRL's forms, and the checks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from trl import DPOConfig, DPOTrainer

from integration_tests.helpers.models import LLAMA, VOCAB, enlarge
from integration_tests.helpers.text import tokenizer
from peft_fanlora import FanLoraConfig, ParaConfig


ROWS = 16
END_OF_PROMPT = tokenizer().convert_tokens_to_ids(["answer"])
END_OF_TURN = tokenizer().convert_tokens_to_ids(["<s>", "assistant"])


def question(row: int) -> str:
    return " ".join(f"w{(5 * row + step) % 40}" for step in range(2 + row % 3))


def answer(row: int, *, wrong: bool = False) -> str:
    """A few of five words, so that the answers can be learned; wrong answers have other words."""
    return " ".join(f"w{(52 if wrong else 45) + step}" for step in range(2 + row % 4))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def rows(make: Callable[[int], dict[str, Any]]) -> Dataset:
    return Dataset.from_list([make(row) for row in range(ROWS)])


def config(method: str, **fields: Any) -> PeftConfig:
    fields = {"r": 4, **fields}
    if method == "FanLoRA":
        fields.pop("prompt_end_token_ids", None)
        return FanLoraConfig(**fields)
    return ParaConfig(**fields)


def base(model_class: str = "LlamaForCausalLM", **overrides: Any) -> nn.Module:
    """Makes a tiny Llama whose weights are large enough for its layers to matter."""
    torch.manual_seed(0)
    fields = {**LLAMA, "num_hidden_layers": 2, **overrides}
    return enlarge(getattr(tf, model_class)(tf.LlamaConfig(**fields))).eval()


def adapted(method: str, model: nn.Module | None = None, task_type: str = "CAUSAL_LM", **fields: Any) -> PeftModel:
    model = base() if model is None else model
    torch.manual_seed(0)
    return get_peft_model(model, config(method, task_type=task_type, **fields))


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    """Small arguments for any of TRL's trainers, whose own defaults stay otherwise."""
    return {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def check_only_the_adapter_moved(model: PeftModel, before: dict[str, torch.Tensor], prefix: str | None = None) -> None:
    """Exactly the trainable parameters have changed; other adapters, such as a reference, are frozen."""
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert trainable and all(".default." in name or "score" in name for name in trainable)


def check_saved(trainer: Any, folder: Path, plain: nn.Module) -> None:
    """What is saved is one adapter that computes the same in a fresh model."""
    trainer.save_model(str(folder))
    assert [file.name for file in folder.glob("*.safetensors")] == ["adapter_model.safetensors"]
    loaded = PeftModel.from_pretrained(plain, folder).eval()
    batch = torch.randint(7, VOCAB, (2, 6), generator=torch.Generator().manual_seed(0))
    trained = trainer.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(batch).logits, trained(batch).logits, atol=1e-6, rtol=0)
        with loaded.disable_adapter():
            assert not torch.allclose(loaded(batch).logits, trained(batch).logits, atol=1e-3)


def check_resumes(make: Callable[[Path], Any], folder: Path, step: int) -> None:
    """A run that continues from its checkpoint ends where the uninterrupted one did."""
    whole, resumed = make(folder), make(folder)
    whole.train()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    expected = snapshot(whole.model)
    for name, value in snapshot(resumed.model).items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-4, msg=name)


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def forward(model: nn.Module, batch: dict[str, Any]) -> Any:
    """A training-mode pass over what a trainer would train on."""
    keys = ("input_ids", "attention_mask", "position_ids", "labels")
    with torch.no_grad():
        return model.train()(**{key: batch[key] for key in keys if key in batch}, use_cache=False)


def check_no_leak(model: PeftModel, batch: dict[str, Any], in_prompt: torch.Tensor) -> None:
    """Other answers change no logit of the prompt, which they would if a vector had seen them.

    Args:
        model: the trained model.
        batch: what the trainer would train on.
        in_prompt: which tokens are a prompt, bool (batch, tokens), as the test knows it.
    """
    ids = batch["input_ids"]
    other = torch.where(in_prompt | (ids < 7), ids, 7 + (ids - 7 + 11) % (VOCAB - 7))
    assert not torch.equal(other, ids) and in_prompt.any()
    changed = {**batch, "input_ids": other}
    if "labels" in batch:
        changed["labels"] = torch.where(batch["labels"] == -100, -100, other)
    before, after = (forward(model, each).logits for each in (batch, changed))
    torch.testing.assert_close(after[in_prompt], before[in_prompt], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(after[~in_prompt], before[~in_prompt], atol=1e-3)


def pairs(row: int) -> dict[str, Any]:
    return {"prompt": question(row), "chosen": f" {answer(row)}", "rejected": f" {answer(row, wrong=True)}"}


def implicit_pairs(row: int) -> dict[str, Any]:
    """Without a prompt of their own: TRL takes what both have in common for it."""
    return {"chosen": f"{question(row)} {answer(row)}", "rejected": f"{question(row)} {answer(row, wrong=True)}"}


def dpo(method: str, folder: Path, make: Any = pairs, model: Any = None, **options: Any) -> DPOTrainer:
    torch.manual_seed(0)
    return DPOTrainer(
        base() if model is None else model,
        args=DPOConfig(**arguments(folder, **options)),
        train_dataset=rows(make),
        processing_class=tokenizer(),
        peft_config=config(method, task_type="CAUSAL_LM") if model is None else None,
    )
