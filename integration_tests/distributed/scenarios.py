"""What the tests of distributed runs do, in two processes and again in one: the same data, models and steps, divided among the processes.

`torchrun … scenarios.py FOLDER` runs all scenarios and leaves what each process returns in FOLDER. Called in a test's own
process, the same functions give the reference.
"""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from integration_tests.helpers.models import TINY
from integration_tests.helpers.processes import CAN_RESUME_IN_TWO
from integration_tests.helpers.text import sentences, tokenizer
from peft_fanlora import FanLoraCallback, FanLoraConfig, ParaConfig


METHODS = ("FanLoRA", "PARA")
GLOBAL_BATCH = 4
WORDS = sentences(32)
TEXT = Dataset.from_dict({"text": WORDS})
ANSWERS = Dataset.from_list(
    [
        {"prompt": " ".join(words[: 2 + row % 4]), "completion": " " + " ".join(words[2 + row % 4 :])}
        for row, words in enumerate(text.split() for text in WORDS)
    ]
)
PREFERENCES = Dataset.from_list(
    [
        {
            "prompt": " ".join(words[:3]),
            "chosen": " " + " ".join(words[3 : 5 + row % 3]),
            "rejected": " " + " ".join(words[6:2:-1]),
        }
        for row, words in enumerate(text.split() for text in WORDS)
    ]
)
CALIBRATION = TEXT.select(range(11))  # does not divide by the processes, nor by the batch


def num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    return int(os.environ.get("RANK", "0"))


def model(method: str, *, trained: bool = False, **config: Any) -> PeftModel:
    """Makes an adapter on a tiny Llama, the same in every process; a `trained` one changes the output."""
    torch.manual_seed(0)
    made: FanLoraConfig | ParaConfig = (
        FanLoraConfig(r=4, task_type="CAUSAL_LM", **config)
        if method == "FanLoRA"
        else ParaConfig(r=4, task_type="CAUSAL_LM", **config)
    )
    base = TINY["llama"].base()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.25)  # as it comes, so tiny a model is next to linear
    adapted = get_peft_model(base, made)
    if trained:
        generator = torch.Generator().manual_seed(1)
        for parameter in adapter_parameters(adapted).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return adapted


def adapter_parameters(adapted: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}


def values(adapted: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in adapter_parameters(adapted).items()}


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    """Training arguments for one global batch whatever the number of processes."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": GLOBAL_BATCH // num_processes(),
        "per_device_eval_batch_size": 2,
        "learning_rate": 3e-2,
        "adam_epsilon": 1e-3,  # a gradient of rounding errors shall not become a step of full length
        "max_steps": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "ddp_timeout": 60,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        **others,
    }


class Watch(TrainerCallback):
    """Notes what the optimizer and the wrapper around the model hold at the end."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}
        self.trainer: Any = None

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        wrapped = self.trainer.model_wrapped
        groups = kwargs["optimizer"].param_groups
        self.seen = {
            "is_ddp": isinstance(wrapped, DistributedDataParallel),
            "in_optimizer": sum(len(group["params"]) for group in groups),
            "with_moments": len(kwargs["optimizer"].state),
            "steps": sorted({int(moments["step"]) for moments in kwargs["optimizer"].state.values()}),
            "trainable": len(adapter_parameters(self.trainer.model)),
            "wrapped": sum(parameter.requires_grad for parameter in wrapped._module_parameters)
            if isinstance(wrapped, DistributedDataParallel)
            else None,
        }


def run(trainer: Any, resume: str | None = None) -> dict[str, Any]:
    watch = Watch()
    watch.trainer = trainer
    trainer.add_callback(watch)
    trainer.train(resume_from_checkpoint=resume)
    history = trainer.state.log_history
    return {
        "weights": values(trainer.model),
        "losses": [entry["loss"] for entry in history if "loss" in entry],
        "rates": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "best": trainer.state.best_model_checkpoint,
        **watch.seen,
    }


def pruning_run(folder: Path, resume: str | None = None, **others: Any) -> dict[str, Any]:
    """FanLoRA in one run: pruned at step 3 of 6, with checkpoints before and after."""
    callback = FanLoraCallback(CALIBRATION, prune_at=3, keep=2, num_points=4)
    others = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, **others}
    trainer = SFTTrainer(
        model("FanLoRA"),
        args=SFTConfig(**arguments(folder, **others)),
        train_dataset=TEXT,
        eval_dataset=TEXT.select(range(5)),
        processing_class=tokenizer(),
        callbacks=[callback],
    )
    result = run(trainer, resume)
    trainer.save_model(str(folder / "final"))
    scores = None if callback.scores is None else (dict(callback.scores), callback.scores.num_tokens)
    return {**result, "scores": scores, "setting": callback.setting.to_dict()}


def fanlora_pruned(folder: Path) -> dict[str, Any]:
    """DistributedDataParallel would fail on a parameter that never gets a gradient."""
    return pruning_run(folder, ddp_find_unused_parameters=False)


def fanlora_pruned_with_best(folder: Path) -> dict[str, Any]:
    best = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    return pruning_run(folder, **best)


def fanlora_resumed(folder: Path) -> dict[str, Any]:
    """Continues from the checkpoints of `fanlora_pruned`, which ran before."""
    first = folder.parent / "fanlora_pruned"
    return {
        step: pruning_run(folder / str(step), str(first / f"checkpoint-{step}"), ddp_find_unused_parameters=False)
        for step in (2, 4)
    }


def scores(folder: Path) -> dict[str, Any]:
    """Every process scores its own share of the batches, without any trainer."""
    words = tokenizer()
    rows = [words(text) for text in WORDS[:11]]
    loader = DataLoader(rows, batch_size=2, collate_fn=DataCollatorForLanguageModeling(words, mlm=False))
    share = list(loader)[rank() :: num_processes()]
    found = {}
    for method in ("path", "ablation", "sensitivity", "output_norm", "weight_norm"):
        scored = model("FanLoRA", trained=True).score_modules(share, method, progress=False)
        found[method] = (dict(scored), scored.num_tokens, scored.select(keep=2).names)
    return found


def share_of(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.chunk(num_processes())[rank()] for name, value in batch.items()}


def batches() -> Iterator[dict[str, torch.Tensor]]:
    """Batches whose rows have prompts of different lengths, and padding on the right."""
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, 64, (GLOBAL_BATCH, 9), generator=generator)
        attention_mask = torch.ones_like(ids)
        attention_mask[seed, -2:] = 0
        labels = ids.masked_fill(attention_mask == 0, -100)
        for row in range(GLOBAL_BATCH):
            labels[row, : 2 + row] = -100
        yield {"input_ids": ids, "attention_mask": attention_mask, "labels": labels}


def token_sum_loss(adapted: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The cross-entropy, summed: its mean over processes differs from the mean over rows by a known factor only."""
    own = share_of(batch)
    mean = adapted(**own, use_cache=False).loss
    return mean * (own["labels"][:, 1:] != -100).sum() * num_processes()


def gradients_under(wrap: Callable[[PeftModel], nn.Module], method: str, checkpointing: bool | None) -> dict[str, Any]:
    """The gradients of two accumulated batches; `checkpointing` says whether it is reentrant, None for none."""
    adapted = model(method, trained=True).train()
    if checkpointing is not None:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        adapted.enable_input_require_grads()
    wrapped = wrap(adapted)
    for batch in batches():
        token_sum_loss(wrapped, batch).backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(adapted).items()}
    assert all(parameter.grad is None for parameter in adapted.parameters() if not parameter.requires_grad)
    return {
        name: gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient.clone()
        for name, gradient in gradients.items()
    }


def ddp(adapted: PeftModel) -> nn.Module:
    return DistributedDataParallel(adapted) if num_processes() > 1 else adapted


def gradients(folder: Path) -> dict[str, Any]:
    return {
        (method, checkpointing): gradients_under(ddp, method, checkpointing)
        for method in METHODS
        for checkpointing in (None, False, True)
    }


def fsdp(adapted: PeftModel) -> nn.Module:
    if num_processes() > 1:
        for block in adapted.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(adapted)
    return adapted


def fsdp_gradients(folder: Path) -> dict[str, Any]:
    return {
        (method, checkpointing): gradients_under(fsdp, method, checkpointing)
        for method in METHODS
        for checkpointing in (None, False)
    }


def fsdp_saved(folder: Path) -> dict[str, Any]:
    """Two steps of a sharded model, and the adapter saved from its gathered weights."""
    found = {}
    for method in METHODS:
        adapted = model(method, trained=True).train()
        wrapped = fsdp(adapted)
        optimizer = torch.optim.SGD(adapter_parameters(adapted).values(), lr=0.01)
        for batch in batches():
            token_sum_loss(wrapped, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        state = get_model_state_dict(adapted, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank() == 0:
            adapted.save_pretrained(folder / method, state_dict=state)
        found[method] = values(adapted) if num_processes() == 1 else None
    return found


def fsdp_refusals(folder: Path) -> dict[str, Any]:
    """What scoring and pruning say to an adapter whose weights are sharded."""
    adapted = model("FanLoRA", trained=True)
    setting = adapted.score_modules(None, "weight_norm", progress=False).select(keep=2)
    fsdp(adapted)
    refusals = {}
    for name, call in {
        "score": lambda: adapted.score_modules([next(batches())], progress=False),
        "prune": lambda: adapted.prune_modules(setting),
    }.items():
        try:
            call()
        except ValueError as error:
            refusals[name] = str(error)
    return refusals


def sft_run(method: str, folder: Path, resume: str | None = None) -> dict[str, Any]:
    """Six steps with TRL's defaults: gradient checkpointing among them."""
    trainer = SFTTrainer(
        model(method),
        args=SFTConfig(**arguments(folder / method, save_strategy="steps", save_steps=3)),
        train_dataset=ANSWERS,
        processing_class=tokenizer(),
    )
    return run(trainer, resume)


def sft(folder: Path) -> dict[str, Any]:
    return {method: sft_run(method, folder) for method in METHODS}


def sft_resumed(folder: Path) -> dict[str, Any]:
    """The last three steps of `sft`, which ran before."""
    first = folder.parent / "sft"
    return {method: sft_run(method, folder, str(first / method / "checkpoint-3")) for method in METHODS}


def plain_trainer(folder: Path) -> dict[str, Any]:
    """transformers' own Trainer, on rows that the script has tokenised."""
    words = tokenizer()
    rows = []
    for row in ANSWERS:
        prompt, whole = words(row["prompt"])["input_ids"], words(row["prompt"] + row["completion"])["input_ids"]
        rows.append({"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]})
    return {
        method: run(
            Trainer(
                model(method),
                TrainingArguments(**arguments(folder / method, max_steps=3)),
                data_collator=DataCollatorForSeq2Seq(words),
                train_dataset=rows,
            )
        )
        for method in METHODS
    }


def dpo(folder: Path) -> dict[str, Any]:
    found = {}
    for method in METHODS:
        trainer = DPOTrainer(
            model(method),
            args=DPOConfig(**arguments(folder / method, max_steps=3)),
            train_dataset=PREFERENCES,
            processing_class=tokenizer(),
        )
        found[method] = run(trainer)
    return found


def dpo_pruned(folder: Path) -> dict[str, Any]:
    """Preferences have no labels: the callback has a loader of its own, and divides its batches among the processes."""
    words = tokenizer()
    rows = [words(text) for text in WORDS[:11]]
    collator = DataCollatorForLanguageModeling(words, mlm=False)
    callback = FanLoraCallback(DataLoader(rows, 2, collate_fn=collator), prune_at=2, keep=2, num_points=2)
    trainer = DPOTrainer(
        model("FanLoRA"),
        args=DPOConfig(**arguments(folder, max_steps=4)),
        train_dataset=PREFERENCES,
        processing_class=words,
        callbacks=[callback],
    )
    result = run(trainer)
    assert callback.scores is not None and callback.setting is not None
    return {**result, "scores": (dict(callback.scores), callback.scores.num_tokens), "kept": callback.setting.names}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        fanlora_pruned,
        fanlora_pruned_with_best,
        *([fanlora_resumed] if CAN_RESUME_IN_TWO else []),
        scores,
        gradients,
        fsdp_gradients,
        fsdp_saved,
        fsdp_refusals,
        sft,
        *([sft_resumed] if CAN_RESUME_IN_TWO else []),
        plain_trainer,
        dpo,
        dpo_pruned,
    )
}


def close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Compares tensors by name, each to a fraction of its largest value."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        atol = tolerance * float(tensor.abs().max())
        torch.testing.assert_close(
            actual[name], tensor, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def main(folder: Path) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, scenario in SCENARIOS.items():
        result = scenario(folder / name)
        (folder / name).mkdir(exist_ok=True)
        torch.save(result, folder / name / f"rank-{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    gc.freeze()  # the trainers collect garbage often
    main(Path(sys.argv[1]))
