"""PARA on a real chat model and real text: one adapter trained by TRL, its loss before and after, and a generation.

The prompt-completion format defines where each prompt ends, so that nothing else has to be configured. `--ia3` also trains
IA3 on the same modules and batches with its own learning rate, for comparison.

    python examples/para_sft.py
    python examples/para_sft.py --ia3 1e-2 --pooling mean
    python examples/para_sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --dataset trl-lib/tldr
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import assets
import torch
import typer
from datasets import Dataset, load_dataset
from peft import AutoPeftModelForCausalLM, IA3Config, PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from training import BATCH_SIZE, held_out_loss, sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTTrainer

from peft_fanlora import ParaConfig, get_prompt_end_token_ids


NUM_HELD_OUT = 96
MODULES = ["q_proj", "v_proj", "up_proj"]

console = Console()


@dataclass(frozen=True)
class Result:
    """The result of one method."""

    method: str
    learning_rate: float
    parameters: int
    loss_before: float
    loss_after: float
    minutes: float


def train(
    base_model: str, config: PeftConfig, learning_rate: float, steps: int, rows: Dataset, output: Path, seed: int
) -> tuple[PeftModel, Result]:
    """Trains an adapter on the rows after the first `NUM_HELD_OUT`, on which the losses are measured."""
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), config)
    trainer = SFTTrainer(
        model,
        args=sft_arguments(output, steps, learning_rate, seed),
        processing_class=tokenizer,
        train_dataset=rows.select(range(NUM_HELD_OUT, len(rows))),
        eval_dataset=rows.select(range(NUM_HELD_OUT)),
    )
    before = held_out_loss(trainer)
    started = time.perf_counter()
    trainer.train()
    minutes = (time.perf_counter() - started) / 60
    parameters = model.get_nb_trainable_parameters()[0]
    result = Result(str(config.peft_type.value), learning_rate, parameters, before, held_out_loss(trainer), minutes)
    console.print(
        f"{result.method}: held-out loss {result.loss_before:.3f} -> {result.loss_after:.3f}", highlight=False
    )
    return model, result


def answer(folder: Path, messages: list[assets.Message]) -> str:
    """Loads the saved adapter, as a server would, and answers a prompt."""
    model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model.get_base_model().name_or_path)
    prompt: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return str(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    dataset: Annotated[str, typer.Option(help="Hub id of a prompt-completion data set [default: WordNet]")] = "",
    output: Annotated[Path, typer.Option(help="Output folder")] = Path("para-output"),
    steps: Annotated[int, typer.Option(help="Training steps")] = 60,
    pooling: Annotated[str, typer.Option(help="attention, mean, max or last")] = "attention",
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of PARA")] = 3e-3,
    ia3: Annotated[
        float | None, typer.Option(help="Peak learning rate of IA3, which is trained only if this is set")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Trains PARA, prints the held-out loss before and after, and answers a held-out prompt."""
    base_model = model or str(assets.model_folder())
    needed = NUM_HELD_OUT + steps * BATCH_SIZE
    if dataset:
        rows = load_dataset(dataset, split="train").shuffle(seed=seed).select(range(needed))
    else:
        rows = Dataset.from_list(assets.glosses()[:needed])
    config = ParaConfig(
        pooling=pooling,
        # Only needed where labels do not mark the prompt, as with label smoothing; has no effect otherwise.
        prompt_end_token_ids=get_prompt_end_token_ids(AutoTokenizer.from_pretrained(base_model)),
        task_type="CAUSAL_LM",
    )
    trained, result = train(base_model, config, learning_rate, steps, rows, output, seed)
    trained.save_pretrained(output / "adapter")
    results = [result]
    if ia3 is not None:
        other = IA3Config(target_modules=MODULES, feedforward_modules=[], task_type="CAUSAL_LM")
        results.append(train(base_model, other, ia3, steps, rows, output, seed)[1])

    table = Table("", "lr", "parameters", "before", "after", "minutes", title=f"Loss on {NUM_HELD_OUT} held-out rows")
    for each in results:
        figures = (f"{each.loss_before:.3f}", f"{each.loss_after:.3f}", f"{each.minutes:.1f}")
        table.add_row(each.method, f"{each.learning_rate:g}", f"{each.parameters:,}", *figures)
    console.print(table)
    messages = rows[0]["prompt"]
    reply = answer(output / "adapter", messages)
    console.print(f"[bold]{messages[-1]['content']}[/bold] {reply}", highlight=False)
    content = {"steps": steps, "seed": seed, "results": [asdict(each) for each in results], "sample": reply}
    (output / "results.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
