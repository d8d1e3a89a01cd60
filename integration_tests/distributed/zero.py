"""What the tests of DeepSpeed ZeRO do: `torchrun … zero.py FOLDER` in two processes, the tests again in one without it.

accelerate chooses no backend for DeepSpeed on CPUs, so that this script chooses gloo. It keeps DeepSpeed from compiling
its own communication through shared memory.
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
    optimization = {"stage": stage, "stage3_param_persistence_threshold": 0}
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


def refusals(name: str, folder: Path, bases: Path) -> dict[str, str]:
    """What a model says whose weights stage 3 has divided. Saves it as the refusal says as well."""
    import deepspeed

    made = trainer(name, folder, 3, bases)
    made.train()
    model: Any = made.model
    own, kept = folder / f"rank-{scenarios.rank()}", setting()
    found = {"save": error_of(lambda: model.save_pretrained(own / "saved"))}
    if name == "FanLoRA":
        found |= {
            "score": error_of(lambda: model.score_modules([next(scenarios.batches())], progress=False)),
            "score weights": error_of(lambda: model.score_modules(None, "weight_norm", progress=False)),
            "prune": error_of(lambda: model.prune_modules(kept)),
            "export": error_of(lambda: export_lora(model, own / "exported")),
        }
    with deepspeed.zero.GatheredParameters([each for each in model.parameters() if each.requires_grad]):
        model.save_pretrained(folder / "gathered", is_main_process=scenarios.rank() == 0)
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
def served(method: str, stage: int | None, bases: Path) -> dict[str, Any]:
    """A call and a generation of one adapter of two, and what a mixed batch says."""
    arguments = {} if stage is None else {"deepspeed": zero(stage), "use_cpu": False}
    args = SFTConfig(**scenarios.arguments(bases, **arguments))  # lives as long as the model is used
    model = several(method, AutoModelForCausalLM.from_pretrained(bases / "llama" / "base"))
    if stage is not None:
        import deepspeed

        sizes = {"train_batch_size": 2, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
        _engine, *_ = deepspeed.initialize(model=model, config=zero(stage) | sizes | {"gradient_clipping": 1.0})
    ids = torch.arange(3, 17).reshape(2, 7)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    length = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    found = {
        "logits": model(**prompt).logits,
        "sequences": model.generate(**prompt, **length),
        "refusal": error_of(lambda: model(**prompt, adapter_names=["second", "first"])),
    }
    del args
    return found


def prepare(folder: Path) -> None:
    """Saves what all processes load."""
    saved_base(folder / "llama")
    saved_base(folder / "gpt2", "gpt2", **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0))
    setting().save_pretrained(folder / "setting")


def main(folder: Path) -> None:
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    bases = folder / "bases"
    results: dict[Any, Any] = {}
    gloo = "gloo", DistributedType.MULTI_CPU
    with mock.patch.object(PartialState, "_prepare_backend", lambda *_, **__: gloo):
        for stage in STAGES:
            for name in [*RUNS, *(OF_CONV1D if stage == 3 else [])]:
                place = folder / f"{stage}" / name
                results[stage, name] = trained(name, place, stage, bases)
                if name in RUNS:
                    resumed = trained(name, folder / f"{stage} resumed" / name, stage, bases, place / "checkpoint-3")
                    results[stage, name, "resumed"] = resumed
            results[stage, "callback"] = callback_refusal(folder / "callback", stage, bases)
        for method in scenarios.METHODS:
            results[method, "refusals"] = refusals(method, folder / "refused" / method, bases)
            results[method, "served"] = served(method, 3, bases)
    torch.save(results, folder / f"rank-{scenarios.rank()}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
