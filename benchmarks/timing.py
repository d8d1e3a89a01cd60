"""Times contestants in turns, so that whatever else slows the machine slows all of them."""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from contestants import BASE, Contestant


@dataclass
class Stopwatch:
    """Measures the seconds of a call, on CUDA by events on its stream.

    Attributes:
        device: "cpu" or "cuda".
        processor_time: whether to count the processor's seconds rather than the clock's, all threads together. On a
            machine that does other work meanwhile, one thread (`OMP_NUM_THREADS=1`) and this give the steadier ratios.
    """

    device: str
    processor_time: bool = False

    def __call__(self, work: Callable[[], Any]) -> float:
        """Runs `work` and returns the seconds that it took."""
        if self.device != "cuda":
            clock = time.process_time if self.processor_time else time.perf_counter
            started = clock()
            work()
            return clock() - started
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


@dataclass
class Generation:
    """A contestant's running generation, one token a call for each row."""

    contestant: Contestant
    tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    cache: Any = None

    def prefill(self, prompt: torch.Tensor) -> None:
        """Starts over from a prompt, (rows, tokens)."""
        self.tokens, self.cache = prompt, None
        self.step()

    def step(self) -> None:
        """Passes the last tokens and takes the likeliest next ones."""
        out = self.contestant.model(
            input_ids=self.tokens,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
            **self.contestant.call,
        )
        self.cache = out.past_key_values
        self.tokens = out.logits[:, -1:].argmax(-1)


Seconds = dict[str, list[float]]


def in_turns(contestants: list[Contestant], rounds: int, measure: Callable[[Contestant], float]) -> Seconds:
    """Measures each contestant once a round, in random order."""
    seconds: Seconds = {contestant.name: [] for contestant in contestants}
    order = list(contestants)
    for _ in range(rounds):
        random.shuffle(order)
        for contestant in order:
            seconds[contestant.name].append(measure(contestant))
    return seconds


@torch.inference_mode()
def decode_steps(
    contestants: list[Contestant], rounds: int, prompts: Callable[[], torch.Tensor], stopwatch: Stopwatch
) -> Seconds:
    """Times single decoding steps; each prompt is gone on from for 20 of them, the first of which does not count."""
    generations = {contestant.name: Generation(contestant) for contestant in contestants}
    seconds: Seconds = {contestant.name: [] for contestant in contestants}
    for start in range(0, rounds, 20):
        prompt = prompts()
        for generation in generations.values():
            generation.prefill(prompt)
            generation.step()
        part = in_turns(contestants, min(20, rounds - start), lambda one: stopwatch(generations[one.name].step))
        for name, values in part.items():
            seconds[name] += values
    return seconds


@torch.inference_mode()
def prefills(
    contestants: list[Contestant], rounds: int, prompts: Callable[[], torch.Tensor], stopwatch: Stopwatch
) -> Seconds:
    """Times passes over whole prompts; one before them does not count."""
    prompt = prompts()
    for contestant in contestants:
        Generation(contestant).prefill(prompt)
    return in_turns(contestants, rounds, lambda one: stopwatch(lambda: Generation(one).prefill(prompt)))


@torch.inference_mode()
def generations(
    contestants: list[Contestant],
    rounds: int,
    prompts: Callable[[], torch.Tensor],
    stopwatch: Stopwatch,
    new_tokens: int,
    beams: int,
) -> Seconds:
    """Times `generate` of a fixed number of tokens."""
    prompt = prompts()

    def generate(contestant: Contestant) -> None:
        contestant.model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=beams,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            pad_token_id=0,
            **contestant.call,
        )

    return in_turns(contestants, rounds, lambda one: stopwatch(lambda: generate(one)))


def summaries(seconds: Seconds) -> list[dict[str, Any]]:
    """Returns each contestant's median time, and the median and quartiles of its ratio to the base model's."""
    found = []
    for name, own in seconds.items():
        ratios = [one / base for one, base in zip(own, seconds[BASE], strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        found.append(
            {
                "method": name,
                "median_ms": round(1000 * statistics.median(own), 2),
                "ratio": round(median, 4),
                "ratio_quartiles": [round(lower, 4), round(upper, 4)],
                "rounds": len(own),
            }
        )
    return found
