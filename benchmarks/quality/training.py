"""One run: an adapter trained on a task's rows, and what it then measures."""

import math
import resource
import time
from typing import Any

import machine
import torch
from peft import PeftModel
from torch.optim import AdamW
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
    set_seed,
)

from .experiments import Run, Store
from .generators import centre, standardise
from .methods import adapted
from .tasks import MIXTURES, TASKS, Rows, Split, Tokens, evaluate, mixed, on, rouge_l, split_of


NUM_GENERATED = 24
WARM_UP = 0.06
CENTRE_ROWS = 128
MAX_GRADIENT_NORM = 1.0


class Bench:
    """What all runs share: the base model's folder, a device, the finished runs."""

    def __init__(self, model: str, device: str, store: Store) -> None:
        self.model = model
        self.device = torch.device(device)
        self.store = store
        tokenizer = AutoTokenizer.from_pretrained(model)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokens = Tokens(tokenizer)

    def base(self, seed: int) -> PreTrainedModel:
        """Loads the base model in float32; what is random in its adapter comes from the seed."""
        set_seed(seed)
        return AutoModelForCausalLM.from_pretrained(self.model, dtype=torch.float32).to(self.device)

    def split(self, task: str) -> Split:
        """Returns a task's rows."""
        return split_of(task)

    def train(self, model: PeftModel, rows: Rows, learning_rate: float, steps: int) -> dict[str, Any]:
        """Trains the adapter on each row once, with AdamW, a linear warm-up and a linear decay.

        Returns:
            The loss of every step, seconds of CPU time (of the process) and of wall time, and the peak memory in bytes,
            of the GPU if the model is on one, else of the process.
        """
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = AdamW(trained, lr=learning_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, max(1, round(WARM_UP * steps)), steps)
        curve = []
        model.train()
        cpu, wall = time.process_time(), time.perf_counter()
        for step, batch in enumerate(tqdm(self.tokens.loader(rows), total=steps, desc="Training", leave=False)):
            loss = model(**on(self.device, batch)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, MAX_GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            if hasattr(model.base_model, "update_and_allocate"):  # AdaLoRA
                model.base_model.update_and_allocate(step)
            optimizer.zero_grad()
            curve.append(round(loss.item(), 4))
        if not math.isfinite(sum(curve)):
            raise FloatingPointError(f"the training loss is not finite: {curve}")
        peak = (
            torch.cuda.max_memory_allocated()
            if self.device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        seconds = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}
        return {"curve": curve, **{name: round(value, 1) for name, value in seconds.items()}, "peak_memory": peak}

    def facts(self) -> dict[str, Any]:
        """Returns what stands beside every result."""
        return {"base_model": self.model.rpartition("/")[2], "machine": machine.facts()}


def run_once(bench: Bench, run: Run) -> dict[str, Any]:
    """Trains and evaluates.

    Of a mixture, each task's results are in `tasks` beside the mean of their losses. They are from half of the dev and
    test rows, without ROUGE-L, since there are several tasks to evaluate.
    """
    splits = [bench.split(task) for task in MIXTURES.get(run.task, (run.task,))]
    model = adapted(bench.base(run.seed), run, bench.store)
    parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    rows = mixed(splits, run.steps, run.seed)
    first_rows = bench.tokens.loader(rows[:CENTRE_ROWS])
    if run.reads == "centred":
        centre(model.eval(), first_rows)
    if run.contrast:
        standardise(model.eval(), first_rows, run.contrast)
    training = bench.train(model, rows, run.learning_rate or 0.0, run.steps)
    dev, test = (_evaluate(bench, model, splits, part) for part in ("dev", "test"))
    if run.task in TASKS and not TASKS[run.task].labels:
        held_out = splits[0].test
        every = max(1, len(held_out) // NUM_GENERATED)
        test["rouge_l"] = rouge_l(model, bench.tokens, held_out[::every][:NUM_GENERATED])
    return {**bench.facts(), "parameters": parameters, "training": training, "dev": dev, "test": test}


def _evaluate(bench: Bench, model: PeftModel, splits: list[Split], part: str) -> dict[str, Any]:
    every = min(2, len(splits))
    found = {
        split.name: evaluate(model, bench.tokens, getattr(split, part)[::every], split.task, f"{split.name}, {part}")
        for split in splits
    }
    if len(splits) == 1:
        return found[splits[0].name]
    return {"loss": sum(one["loss"] for one in found.values()) / len(found), "tasks": found}
