"""Eight tenants with different tasks answer the same question in one batch, with one base model.

Each tenant learns what to do with a word: define it, shout it, spell it, and so on. Each has its own adapter on the
existing setting `smollm2-setting/`, or a PARA adapter. All eight are then loaded into one model and generate in one batch,
and the answers are compared with those of each adapter alone.

    python examples/multi_tenant.py
    python examples/multi_tenant.py --method para --word castle
"""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import assets
import torch
import typer
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from training import sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase, set_seed
from trl import SFTTrainer

from peft_fanlora import FanLoraConfig, ParaConfig, load_tenant


SETTING = Path(__file__).parent / "smollm2-setting"
BATCH_SIZE = 4
LEARNING_RATES = {"fanlora": 2e-3, "para": 5e-3}

console = Console()


class Entry(NamedTuple):
    """A word of the dictionary."""

    word: str
    part: str
    gloss: str


JOBS: dict[str, Callable[[Entry], str]] = {
    "defines": lambda entry: entry.gloss,
    "shouts": lambda entry: entry.word.upper() + "!",
    "spells": lambda entry: "-".join(entry.word),
    "repeats": lambda entry: f"{entry.word}, {entry.word}, {entry.word}",
    "tags": lambda entry: f"{entry.word} ({entry.part})",
    "asks": lambda entry: f"What do you know about {entry.word}?",
    "writes JSON": lambda entry: json.dumps({"word": entry.word, "part": entry.part}),
    "declines": lambda entry: f"Sorry, I do not talk about {entry.word}.",
}


def entries() -> list[Entry]:
    """Returns short words with their definitions, in a fixed order."""
    found = []
    for row in assets.glosses():
        match = re.match(r"Define the (\w+) '([a-z]{3,8})'\.", row["prompt"][-1]["content"])
        if match:
            found.append(Entry(match[2], match[1], row["completion"][0]["content"]))
    return found


def question(word: str) -> list[assets.Message]:
    # Without a system message the chat template inserts a longer one.
    return [{"role": "system", "content": "A word."}, {"role": "user", "content": word}]


def train_tenant(
    base_model: str, config: PeftConfig, learning_rate: float, rows: list[dict], steps: int, folder: Path
) -> None:
    """Trains one tenant's adapter and saves it."""
    set_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), config)
    SFTTrainer(
        model,
        args=sft_arguments(folder, steps, learning_rate, batch_size=BATCH_SIZE),
        processing_class=AutoTokenizer.from_pretrained(base_model),
        train_dataset=Dataset.from_list(rows),
    ).train()
    model.save_pretrained(folder)


def answers(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    conversations: list[list[assets.Message]],
    names: list[str],
    new_tokens: int,
) -> tuple[list[str], float]:
    """Answers conversations in one batch, each with the adapter of that name; returns the answers and the seconds."""
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    started = time.perf_counter()
    output = model.generate(**inputs, adapter_names=names, max_new_tokens=new_tokens, do_sample=False)
    seconds = time.perf_counter() - started
    replies = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [reply.strip() for reply in replies], seconds


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    method: Annotated[str, typer.Option(help="fanlora or para")] = "fanlora",
    setting: Annotated[str, typer.Option(help="Folder or Hub id of the setting, for FanLoRA")] = str(SETTING),
    word: Annotated[str, typer.Option(help="Word that all tenants are asked about")] = "lantern",
    output: Annotated[Path, typer.Option(help="Output folder for the adapters")] = Path("tenants-output"),
    steps: Annotated[int, typer.Option(help="Training steps of each tenant")] = 20,
    new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens per answer")] = 24,
) -> None:
    """Trains eight tenants and generates their answers in one batch."""
    if method not in LEARNING_RATES:
        raise typer.BadParameter(f"{method!r} is unknown; use fanlora or para.", param_hint="--method")
    base_model = model or str(assets.model_folder())
    words = [entry for entry in entries() if entry.word != word][: steps * BATCH_SIZE]
    for number, (name, job) in enumerate(JOBS.items(), start=1):
        console.rule(f"Tenant {number} of {len(JOBS)}: {name}")
        config = (
            ParaConfig(task_type="CAUSAL_LM")
            if method == "para"
            else FanLoraConfig(setting=setting, r=8, lora_alpha=16, task_type="CAUSAL_LM")
        )
        rows = [
            {"prompt": question(entry.word), "completion": [{"role": "assistant", "content": job(entry)}]}
            for entry in words
        ]
        train_tenant(base_model, config, LEARNING_RATES[method], rows, steps, output / name)

    console.rule("All tenants in one model")
    first, *others = JOBS
    base = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    served = PeftModel.from_pretrained(base, output / first, adapter_name=first).eval()
    for name in others:
        load_tenant(served, output / name, name)
    tokenizer = AutoTokenizer.from_pretrained(base_model, padding_side="left")
    names = [*JOBS, "__base__"]
    together, seconds = answers(served, tokenizer, [question(word)] * len(names), names, new_tokens)

    table = Table(
        "tenant", "answer", title=f"{word}: {len(names)} rows in one batch, {seconds:.1f} s", show_lines=True
    )
    alone_seconds = 0.0
    for name, reply in zip(names, together, strict=True):
        (alone,), own_seconds = answers(served, tokenizer, [question(word)], [name], new_tokens)
        if alone != reply:
            raise RuntimeError(f"tenant {name!r} answers {alone!r} alone and {reply!r} in the batch")
        alone_seconds += own_seconds
        table.add_row(name, reply)
    console.print(table)
    console.print(f"One after another, the same answers took {alone_seconds:.1f} s.", highlight=False)
    (output / "answers.json").write_text(json.dumps(dict(zip(names, together, strict=True)), indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
