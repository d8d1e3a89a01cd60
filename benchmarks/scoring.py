"""Compares the run time of all scores on the same batches, and their rank correlation with `ablation`.

    python benchmarks/scoring.py --output benchmarks/results/scoring-cpu.json

LoRA on all 210 linear layers of SmolLM2-135M-Instruct is trained for a few steps on WordNet definitions. Then each
score is computed on the same calibration batches.
"""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import machine
import torch
import typer
from peft import get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_fanlora import FanLoraConfig
from peft_fanlora.fanlora.importance import SCORES


sys.path.append(str(Path(__file__).parent.parent / "examples"))
import assets


def batches(rows: list[assets.Row], tokenizer: object, size: int) -> list[dict[str, torch.Tensor]]:
    """Returns tokenized conversations as padded batches, in which only the answers have labels."""
    made = []
    for start in range(0, len(rows), size):
        prompts, texts = [], []
        for row in rows[start : start + size]:
            prompts.append(tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True))
            texts.append(tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False))
        batch = dict(
            tokenizer(texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False)
        )
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        for label, prompt in zip(labels, prompts, strict=True):
            label[: len(tokenizer(prompt, add_special_tokens=False)["input_ids"])] = -100
        made.append({**batch, "labels": labels})
    return made


def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    rows: Annotated[int, typer.Option(help="Calibration rows, scored in batches of four")] = 4,
    steps: Annotated[int, typer.Option(help="Training steps before scoring")] = 10,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Times every score and prints the results as JSON."""
    torch.manual_seed(0)
    folder = model or str(assets.model_folder())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    peft_model = get_peft_model(base, FanLoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM"))
    data = assets.glosses()
    calibration = batches(data[:rows], tokenizer, size=4)
    optimizer = torch.optim.AdamW((p for p in peft_model.parameters() if p.requires_grad), lr=1e-3)
    for batch in tqdm(batches(data[rows : rows + 4 * steps], tokenizer, size=4), desc="Training"):
        peft_model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    peft_model.score_modules(calibration, "sensitivity", progress=False)  # warm-up
    seconds, scores = {}, {}
    for method in SCORES:
        started = time.perf_counter()
        scores[method] = peft_model.score_modules(calibration, method, num_points=8)
        seconds[method] = time.perf_counter() - started
    ranks = {
        method: torch.tensor(list(found.values())).argsort().argsort().double() for method, found in scores.items()
    }
    result = {
        "model": Path(folder).name,
        "modules": len(scores["path"]),
        "calibration_rows": rows,
        "label_tokens": scores["path"].num_tokens,
        "num_points": 8,
        "training_steps": steps,
        "seconds": {method: round(value, 2) for method, value in seconds.items()},
        "seconds_relative_to_ablation": {
            method: round(value / seconds["ablation"], 4) for method, value in seconds.items()
        },
        "rank_correlation_with_ablation": {
            method: round(torch.corrcoef(torch.stack([found, ranks["ablation"]]))[0, 1].item(), 3)
            for method, found in ranks.items()
        },
        "machine": machine.facts(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
