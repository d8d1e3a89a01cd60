"""Times models in turns, so that other load on the machine affects all of them."""

import copy
import inspect
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from .serving.tenants import only_visible


BASE = "base model"
STEPS_PER_PROMPT = 20

Seconds = dict[str, list[float]]


@dataclass
class Contestant:
    """A model to time.

    Attributes:
        name: its name in the results.
        model: the model.
        call: the arguments of its calls besides the tokens, such as `adapter_names`.
        parameters: the number of parameters of one tenant's adapter.
    """

    name: str
    model: nn.Module
    call: dict[str, Any] = field(default_factory=dict)
    parameters: int = 0


@dataclass
class Stopwatch:
    """Measures the seconds of a call, on CUDA with events.

    Attributes:
        device: such as "cpu" or "cuda:0".
        processor_time: whether to measure the CPU time of all threads instead of wall-clock time. On a machine with
            other load, this and a single thread (`OMP_NUM_THREADS=1`) give more stable ratios.
    """

    device: str
    processor_time: bool = False

    def __call__(self, work: Callable[[], Any]) -> float:
        """Runs `work` and returns the seconds that it took."""
        if torch.device(self.device).type != "cuda":
            clock = time.process_time if self.processor_time else time.perf_counter
            started = clock()
            work()
            return clock() - started
        with torch.cuda.device(self.device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            work()
            end.record()
            torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000


class Generation:
    """A contestant's running generation, one token per call and row."""

    def __init__(self, contestant: Contestant) -> None:
        self.contestant = contestant
        self.tokens: Any = None
        self.cache: Any = None
        model: Any = contestant.model
        forward = getattr(model, "get_base_model", lambda: model)().forward
        self.options = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(forward).parameters else {}

    def prefill(self, prompt: torch.Tensor) -> None:
        """Starts a new generation from a prompt, (rows, tokens)."""
        self.tokens, self.cache = prompt, None
        self.step()

    def step(self) -> None:
        """Passes the last tokens and selects the most likely next ones.

        Raises:
            ValueError: the model has no KV cache.
        """
        output = self.contestant.model(
            input_ids=self.tokens, past_key_values=self.cache, use_cache=True, **self.options, **self.contestant.call
        )
        self.cache = getattr(output, "past_key_values", None)
        if self.cache is None:
            raise ValueError(f"The {self.contestant.name} has no KV cache; decoding is timed with one.")
        self.tokens = output.logits[:, -1:].argmax(-1)


def in_turns(contestants: list[Contestant], rounds: Iterable[int], measure: Callable[[Contestant], float]) -> Seconds:
    """Measures each contestant once per round, in random order."""
    seconds: Seconds = {contestant.name: [] for contestant in contestants}
    order = list(contestants)
    for _ in rounds:
        random.shuffle(order)
        for contestant in order:
            seconds[contestant.name].append(measure(contestant))
    return seconds


@torch.inference_mode()
def decode_steps(
    contestants: list[Contestant], rounds: Iterable[int], prompts: Callable[[], torch.Tensor], stopwatch: Stopwatch
) -> Seconds:
    """Times single decoding steps.

    Each prompt is continued for `STEPS_PER_PROMPT` steps, after one that is not counted.

    Args:
        contestants: the models to time.
        rounds: the numbers of the rounds from 0, such as a `range` with a progress bar.
        prompts: returns the next prompt, (rows, tokens).
        stopwatch: measures each step.
    """
    running = {contestant.name: Generation(contestant) for contestant in contestants}
    seconds: Seconds = {contestant.name: [] for contestant in contestants}
    for number in rounds:
        if number % STEPS_PER_PROMPT == 0:
            prompt = prompts()
            for generation in running.values():
                generation.prefill(prompt)
                generation.step()
        for name, values in in_turns(contestants, [number], lambda one: stopwatch(running[one.name].step)).items():
            seconds[name] += values
    return seconds


def summaries(seconds: Seconds) -> list[dict[str, Any]]:
    """Returns each contestant's median time, and the median and quartiles of its ratio to the base model."""
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


def with_tenants(base: nn.Module, config: PeftConfig, names: Sequence[str]) -> PeftModel:
    """Returns a model with an adapter per name, frozen and in eval mode as after loading saved adapters."""
    model = get_peft_model(base, copy.deepcopy(config), adapter_name=names[0])
    for name in names[1:]:
        with only_visible(base, name):  # otherwise PEFT visits all earlier adapters, which takes minutes
            model.add_adapter(name, copy.deepcopy(config))
    model.requires_grad_(False)
    return model.eval()


def twin(model: nn.Module) -> nn.Module:
    """Returns a copy of a model that shares its weights in memory."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
