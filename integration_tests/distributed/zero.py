"""What the tests of DeepSpeed ZeRO do, in two processes that `torchrun … zero.py FOLDER` starts, and again in one without it.

Of DeepSpeed's own operators none is compiled. accelerate chooses no backend for DeepSpeed on CPUs, so that this script
chooses gloo.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from integration_tests.distributed import scenarios
from integration_tests.helpers.models import config_of, saved_base
from integration_tests.helpers.text import tokenizer
from peft_fanlora import FanLoraCallback, FanLoraSetting, export_lora


STAGES = (1, 2, 3)
RUNS = {"FanLoRA": ("FanLoRA", "llama"), "setting": ("FanLoRA", "llama"), "PARA": ("PARA", "llama")}
OF_CONV1D = {"FanLoRA, GPT-2": ("FanLoRA", "gpt2"), "PARA, GPT-2": ("PARA", "gpt2")}
"""Layers whose size is that of their weight."""


def zero(stage: int) -> dict[str, Any]:
    """A configuration that divides even the smallest parameters."""
    optimization = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    optimizer = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    return {"zero_optimization": optimization, **dict.fromkeys(sizes, "auto"), **optimizer}


def setting() -> FanLoraSetting:
    trained = scenarios.model("FanLoRA", trained=True)
    return trained.score_modules(None, "weight_norm", progress=False).select(keep=2)


def trainer(name: str, folder: Path, stage: int | None, bases: Path, **others: Any) -> SFTTrainer:
    """Makes a trainer as scripts do: the arguments come first, so that stage 3 loads the base model in shares."""
    arguments = scenarios.arguments(folder, save_strategy="steps", save_steps=3)
    if stage is not None:
        arguments |= {"deepspeed": zero(stage), "use_cpu": False}
    args = SFTConfig(**arguments)
    method, architecture = {**RUNS, **OF_CONV1D}[name]
    config = config_of(method, **({"setting": bases / "setting"} if name == "setting" else {}))
    base = AutoModelForCausalLM.from_pretrained(bases / architecture / "base")
    torch.manual_seed(0)
    return SFTTrainer(
        get_peft_model(base, config),
        args=args,
        train_dataset=scenarios.ANSWERS,
        processing_class=tokenizer(),
        **others,
    )


def trained(name: str, folder: Path, stage: int | None, bases: Path, resume: Path | None = None) -> dict[str, Any]:
    """Six steps, with checkpoints after three and six."""
    made = trainer(name, folder, stage, bases)
    made.train(resume_from_checkpoint=resume and str(resume))
    return {"losses": [entry["loss"] for entry in made.state.log_history if "loss" in entry]}


def error_of(act: Callable[[], Any]) -> str:
    """Returns the message of the ValueError that is raised; "" for none."""
    try:
        act()
    except ValueError as error:
        return str(error)
    return ""


def refusals(name: str, folder: Path, stage: int, bases: Path) -> dict[str, str]:
    """What a model says that DeepSpeed has taken over."""
    made = trainer(name, folder, stage, bases)
    made.train()
    model: Any = made.model
    kept = setting()
    found = {"save": error_of(lambda: model.save_pretrained(folder / "saved"))}
    if name == "FanLoRA":
        found |= {
            "score": error_of(lambda: model.score_modules([next(scenarios.batches())], progress=False)),
            "score weights": error_of(lambda: model.score_modules(None, "weight_norm", progress=False)),
            "prune": error_of(lambda: model.prune_modules(kept)),
            "export": error_of(lambda: export_lora(model, folder / "exported")),
        }
    return found


def callback_refusal(folder: Path, stage: int, bases: Path) -> str:
    callback = FanLoraCallback(scenarios.CALIBRATION, prune_at=1)
    return error_of(trainer("FanLoRA", folder, stage, bases, callbacks=[callback]).train)


def several(method: str, base: nn.Module) -> PeftModel:
    """Two adapters with random weights."""
    model = get_peft_model(base, config_of(method), adapter_name="first")
    model.add_adapter("second", config_of(method))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name or ".para_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


@torch.no_grad()
def served(method: str, stage: int | None, bases: Path) -> dict[str, torch.Tensor]:
    """Calls of one adapter and of several, and a generation."""
    args = SFTConfig(
        **scenarios.arguments(bases, **({} if stage is None else {"deepspeed": zero(stage), "use_cpu": False}))
    )
    model = several(method, AutoModelForCausalLM.from_pretrained(bases / "llama" / "base"))
    if stage is not None:
        import deepspeed

        config = zero(stage) | {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1}
        config |= {"gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
        deepspeed.initialize(model=model, config=config)
    del args
    ids = torch.arange(3, 17).reshape(2, 7)
    mixed = {"adapter_names": ["second", "first"]}
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    return {
        "one": model(**prompt).logits,
        "mixed": model(**prompt, **mixed).logits,
        "generated": model.generate(**prompt, **length),
        "mixed, generated": model.generate(**prompt, **length, **mixed),
    }


def prepare(folder: Path) -> None:
    """Saves what all processes load."""
    for architecture in ("llama", "gpt2"):
        saved_base(folder / architecture, architecture)
    setting().save_pretrained(folder / "setting")


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled
    bases = folder / "bases"
    gloo = mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_CPU))
    results: dict[Any, Any] = {}
    with gloo:
        for stage in STAGES:
            for name in [*RUNS, *(OF_CONV1D if stage == 3 else [])]:
                place = folder / f"{stage}" / name
                results[stage, name] = trained(name, place, stage, bases)
                if name in RUNS:
                    resumed = trained(name, folder / f"{stage} resumed" / name, stage, bases, place / "checkpoint-3")
                    results[stage, name, "resumed"] = resumed
            results[stage, "callback"] = callback_refusal(folder / "callback", stage, bases)
        for method in scenarios.METHODS:
            results[method, "refusals"] = refusals(method, folder / "refused" / method, 3, bases)
            results[method, "served"] = served(method, 3, bases)
    torch.save(results, folder / f"rank-{scenarios.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
