"""Times the methods on one GPU in a few minutes: a Llama of 7B shape with random bfloat16 weights, without downloads.

    python benchmarks/gpu.py --output benchmarks/results/gpu.json

First, for each number of tenants: peak memory, decoding steps, and prefills of 2,048 tokens in total. Then decoding
steps as CUDA graphs, each of which takes a minute or more to compile. The file is written after each measurement. It
lists as left out what would begin after `--minutes` and what failed, with the reason. CPUs have no memory and graphs.
"""

import gc
import json
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import contestants
import machine
import torch
import typer
from peft import PeftModel
from shapes import Shape, load
from timing import prefills
from torch import nn
from torch._inductor import config as inductor
from transformers import StaticCache, set_seed

from peft_fanlora.sharing.writing import staged
from peft_fanlora.timing import BASE, Contestant, Generation, Stopwatch, decode_steps, in_turns, summaries


PROMPT_LENGTH = 64
PREFILL_TOKENS = 2048
WARM_UP = 4
"""Compiled steps that are not timed: they compile, run without a graph, record it and replay it."""

Results = list[dict[str, Any]]


@dataclass
class Report:
    """The content of the output file; nothing more begins after the deadline, a time of `time.monotonic`."""

    facts: dict[str, Any]
    output: Path | None
    deadline: float
    results: Results = field(default_factory=list)
    left_out: Results = field(default_factory=list)

    def add(self, case: dict[str, Any], measure: Callable[[], Results]) -> None:
        """Measures a case if there is time left, and writes the results, or the reason why there are none."""
        results, left_out = [], []
        try:
            if time.monotonic() >= self.deadline:
                raise TimeoutError("no time left")
            results = [{**case, **result} for result in measure()]
        except Exception as error:  # such as too little memory, or a call that is not one graph
            left_out = [{**case, "reason": " ".join(f"{type(error).__name__}: {error}".split())[:500]}]
        for each in results + left_out:
            print(json.dumps(each), flush=True)
        self.results += results
        self.left_out += left_out
        if self.output is not None:
            content = {**self.facts, "results": self.results, "left_out": self.left_out}
            with staged(self.output.parent) as stage:
                (stage / self.output.name).write_text(json.dumps(content, indent=1) + "\n")


def random_tokens(base: Any, rows: int, tokens: int) -> torch.Tensor:
    """Returns a prompt, (rows, tokens)."""
    return torch.randint(10, base.config.vocab_size, (rows, tokens), device=base.device)


def rounds_within(rounds: int, seconds: float) -> Iterator[int]:
    """Yields the numbers of rounds; after the seconds have passed, no more than two."""
    end = time.monotonic() + seconds
    return (number for number in range(rounds) if number < 2 or time.monotonic() < end)


@torch.inference_mode()
def peak_memory(contestant: Contestant, prompt: torch.Tensor, before: int) -> Results:
    """Returns the megabytes that a prompt and four steps take at most, beyond the `before` bytes that others take."""
    torch.cuda.reset_peak_memory_stats()
    generation = Generation(contestant)
    generation.prefill(prompt)
    for _ in range(4):
        generation.step()
    return [{"beyond_base_weights_mb": round((torch.cuda.max_memory_allocated() - before) / 2**20)}]


def in_eager_mode(report: Report, base: Any, tenants: int, rounds: int, seconds: float, stopwatch: Stopwatch) -> None:
    """Measures memory, decoding steps for at most some `seconds`, and prefills, with a number of tenants."""
    rows, made = max(8, tenants), []

    def make(name: str) -> Results:
        before = torch.cuda.memory_allocated()
        made.append(contestants.make(name, base, tenants, rows))
        on_gpu = base.device.type == "cuda"
        return peak_memory(made[-1], random_tokens(base, rows, PROMPT_LENGTH), before) if on_gpu else []

    def decode() -> Results:
        limited = rounds_within(rounds, seconds)
        return summaries(decode_steps(made, limited, lambda: random_tokens(base, rows, PROMPT_LENGTH), stopwatch))

    def prefill() -> Results:
        few = max(2, rounds // 6)
        return summaries(prefills(made, few, lambda: random_tokens(base, rows, PREFILL_TOKENS // rows), stopwatch))

    case = {"tenants": tenants, "rows": rows}
    for name in contestants.names(tenants):
        report.add({"measure": "memory", **case, "method": name}, lambda name=name: make(name))
    report.add({"measure": "decode", **case}, decode)
    report.add({"measure": "prefill", **case}, prefill)


def compiled(model: nn.Module) -> Callable[..., Any]:
    """Returns the forward of a model as one CUDA graph."""

    def forward(**inputs: Any) -> Any:
        return model(**inputs)

    forward.__code__ = forward.__code__.replace()  # torch.compile keeps its results with the code object, up to eight
    return torch.compile(forward, fullgraph=True, dynamic=False, mode="reduce-overhead")


class GraphGeneration(Generation):
    """A generation with a static cache, whose prompt is read in eager mode and whose steps are compiled."""

    def __init__(self, model: nn.Module, prompt: torch.Tensor, steps: int) -> None:
        super().__init__(Contestant("", model))
        self.start = prompt.shape[1] + WARM_UP
        self.tokens, self.cache = prompt, StaticCache(config=model.config, max_cache_len=self.start + steps)
        self.step()
        self.contestant.model = compiled(model)
        for _ in range(WARM_UP):
            self.step()

    def rewind(self) -> None:
        """Removes all tokens after the warm-up from the cache, in place, and takes one step that is not timed."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)
        self.step()


@inductor.patch("triton.cudagraph_or_error", True)  # otherwise a call without a graph is only a warning
@torch.inference_mode()
def as_graphs(report: Report, base: Any, tenants: int, rounds: int, stopwatch: Stopwatch) -> None:
    """Times decoding steps as CUDA graphs, each contestant in turns with the base model.

    The guards are Python code of torch.compile that checks at each call whether the graph is still valid. Steps are
    timed with guards, as in `generate`, and without, as in serving engines.
    """
    prompt = random_tokens(base, max(8, tenants), PROMPT_LENGTH)
    running: dict[str, GraphGeneration] = {}

    def steps(name: str) -> Results:
        contestant = contestants.make(name, base, tenants, len(prompt))
        model, adapters = contestant.model, nullcontext()
        if isinstance(model, PeftModel):  # as in PEFT's `generate`, which selects the adapters once for all steps
            adapters = model._enable_peft_forward_hooks(prompt, **contestant.call)
            model = model.get_base_model()
        with adapters:
            started = time.perf_counter()
            own = GraphGeneration(model, prompt, rounds + 1)
            compile_s = round(time.perf_counter() - started, 1)
            if name == BASE:
                running[BASE] = own
            pair, found = {name: own, BASE: running[BASE]}, []
            for guards in (True, False):
                with torch.compiler.set_stance("default", skip_guard_eval_unsafe=not guards):
                    for generation in pair.values():
                        generation.rewind()
                    turns = [Contestant(each, model) for each in pair]
                    seconds = in_turns(turns, range(rounds), lambda one: stopwatch(pair[one.name].step))
                found.append({**summaries(seconds)[0], "guards": guards, "compile_s": compile_s})
        return found

    # PEFT's loops over the tenants of a batch take many minutes to trace, so they are last.
    for name in sorted(contestants.names(tenants), key=lambda name: name.startswith("PEFT")):
        case = {"measure": "decode, CUDA graphs", "tenants": tenants, "rows": len(prompt), "method": name}
        report.add(case, lambda name=name: steps(name))
        free()
    torch.compiler.reset()


def free() -> None:
    """Frees the memory of contestants that are no longer used."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main(
    shape: Annotated[Shape, typer.Option(help="Random weights of a Llama shape")] = Shape.b7,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cuda",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16, of the model and the adapters")] = "bfloat16",
    tenants: Annotated[list[int] | None, typer.Option(help="Tenants in the batch [default: 8 1 32 64]")] = None,
    rounds: Annotated[int, typer.Option(help="Decoding steps of each contestant; a sixth of it for prefills")] = 60,
    minutes: Annotated[float, typer.Option(help="Nothing begins after these")] = 8,
    output: Annotated[Path | None, typer.Option(help="The JSON file to write")] = None,
) -> None:
    """Measures the most important cases first, until the minutes have passed."""
    deadline = time.monotonic() + 60 * minutes
    set_seed(0)
    base: Any = load(shape, "", device, getattr(torch, dtype))
    with torch.inference_mode():
        base(random_tokens(base, 8, 8))  # allocates the workspaces of CUDA's libraries
    facts = {
        "model": f"random, {shape.value}",
        "device": device,
        "dtype": dtype,
        "rank": contestants.RANK,
        "prompt_length": PROMPT_LENGTH,
        "prefill_tokens": PREFILL_TOKENS,
        "machine": machine.facts(),
    }
    report, stopwatch, counts = Report(facts, output, deadline), Stopwatch(device), tenants or [8, 1, 32, 64]
    for count in counts:
        in_eager_mode(report, base, count, rounds, 60 * minutes / 24, stopwatch)
        free()
    for count in counts if base.device.type == "cuda" else []:
        as_graphs(report, base, count, rounds, stopwatch)


if __name__ == "__main__":
    typer.run(main)
