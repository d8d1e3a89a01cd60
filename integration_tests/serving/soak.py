"""Serves thousands of mixed calls in four threads, and reports wrong rows and what is left behind.

`make soak` runs this for minutes; a test does for seconds. Each call is a forward pass, a generation, one with a limit on
its time, one that a hook interrupts in the middle, or a tenant that comes, is served and goes. Each row is compared with
what its adapter gave for it alone in the first call. Calls are seeded; their order among threads is not.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaForSequenceClassification
from transformers.modeling_layers import GradientCheckpointingLayer

from integration_tests.helpers.counting import num_hooks, tensor_bytes
from integration_tests.helpers.models import config_of, randomize, tiny, tokens
from peft_fanlora import load_tenant
from peft_fanlora.serving.tenants import BASE_ROWS


TENANTS = ("default", "two", "three", BASE_ROWS)
PROMPTS = [tokens(1, length, seed)[0] for seed, length in enumerate((3, 5, 8, 6))]
NEW = 3
THREADS = 4
SERVICES = [(method, what) for method in ("FanLoRA", "PARA") for what in ("plain", "heads", "tokens")]


class Interrupted(Exception):
    """Raised by a hook in the middle of a call."""


class Interruptions(threading.local):
    """A hook that raises when this thread has passed it `left` times.

    Attributes:
        raised: has an entry for each time that it has raised, in any thread.
    """

    left = 0
    raised: ClassVar[list[str]] = []

    def __call__(self, *_: Any) -> None:
        if self.left:
            self.left -= 1
            if not self.left:
                self.raised.append(threading.current_thread().name)
                raise Interrupted


@dataclass
class Service:
    """A model with its tenants, and what each gave for each prompt alone."""

    name: str
    model: PeftModel
    guest: Path
    interruptions: Interruptions = field(default_factory=Interruptions)
    truth: dict[tuple[str, int], tuple[torch.Tensor, list[int]]] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return "heads" not in self.name

    def batch(self, prompts: list[int]) -> dict[str, torch.Tensor]:
        """Pads prompts to one length: on the left for generation, on the right for a head at the last token."""
        side = "left" if self.generates else "right"
        own = [PROMPTS[index] for index in prompts]
        ids = nn.utils.rnn.pad_sequence(own, batch_first=True, padding_side=side)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in own], batch_first=True, padding_side=side)
        return {"input_ids": ids, "attention_mask": mask}

    def outputs(self, batch: dict[str, Any]) -> list[torch.Tensor]:
        """Returns the logits of each row, at its last token."""
        with torch.no_grad():
            logits = self.model(**batch).logits
        return list(logits[:, -1] if self.generates else logits)

    def continuations(self, batch: dict[str, Any], **options: Any) -> list[list[int]]:
        options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": NEW, "min_new_tokens": NEW, **options}
        return self.model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :].tolist()

    def first_calls(self) -> None:
        """Serves each prompt to each tenant alone."""
        for name in TENANTS:
            for index in range(len(PROMPTS)):
                batch = {**self.batch([index]), "adapter_names": [name]}
                new = self.continuations(batch)[0] if self.generates else []
                self.truth[name, index] = self.outputs(batch)[0], new


def service(method: str, what: str, folder: Path) -> Service:
    def config(**fields: Any) -> PeftConfig:
        more = {"trainable_token_indices": list(range(3, 30))} if what == "tokens" else {}
        return config_of(method, task_type="SEQ_CLS" if what == "heads" else "CAUSAL_LM", **more, **fields)

    base = tiny("llama", num_hidden_layers=2, num_labels=3)
    if what == "heads":
        base = LlamaForSequenceClassification(base.config)
    model = get_peft_model(base, config(r=4))
    model.add_adapter("two", config(r=4) if method == "PARA" else config(r=2, target_modules=["v_proj", "up_proj"]))
    model.add_adapter("three", config(r=2))
    for seed, name in enumerate(("default", "two", "three")):
        randomize(model, name, seed=seed)
        for key, parameter in model.named_parameters():
            if f".{name}" in key and ("modules_to_save" in key or "token_adapter" in key):
                generator = torch.Generator().manual_seed(seed)
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    model.save_pretrained(folder, selected_adapters=["two"])
    made = Service(f"{method}, {what}", model.eval(), folder / "two")
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, GradientCheckpointingLayer) or name.endswith(("layernorm", "act_fn")):
            module.register_forward_pre_hook(made.interruptions)
    made.first_calls()
    return made


def wrong_rows(own: Service, names: list[str], prompts: list[int], rng: random.Random, **options: Any) -> list[str]:
    """Serves a mixed batch. Returns its rows that are not what they were in the first call."""
    batch = {**own.batch(prompts), "adapter_names": names}
    expected = [
        own.truth["two" if name.startswith("guest") else name, index]
        for name, index in zip(names, prompts, strict=True)
    ]
    if own.generates and (options or rng.random() < 0.5):
        found: list[Any] = own.continuations(batch, **options)
        right = [new[: len(row)] == row for row, (_, new) in zip(found, expected, strict=True)]
    else:
        found = own.outputs(batch)
        right = [torch.allclose(row, logits, atol=1e-4) for row, (logits, _) in zip(found, expected, strict=True)]
    return [f"{own.name}: {names} {prompts}" for is_right in right if not is_right]


def mixed(own: Service, rng: random.Random) -> tuple[list[str], list[int]]:
    rows = rng.randint(1, 4)
    return rng.choices(TENANTS, k=rows), rng.choices(range(len(PROMPTS)), k=rows)


def served(own: Service, rng: random.Random) -> list[str]:
    return wrong_rows(own, *mixed(own, rng), rng)


def timed_out(own: Service, rng: random.Random) -> list[str]:
    return wrong_rows(own, *mixed(own, rng), rng, **({"max_time": 0.0} if own.generates else {}))


def interrupted(own: Service, rng: random.Random) -> list[str]:
    """A call that a hook interrupts, and the same call again."""
    batch = mixed(own, rng)
    own.interruptions.left = rng.randint(1, 8 * (NEW if own.generates else 1))
    try:
        wrong = wrong_rows(own, *batch, rng)
    except Interrupted:
        wrong = []
    finally:
        own.interruptions.left = 0
    return wrong + wrong_rows(own, *batch, rng)


def visited(own: Service, rng: random.Random) -> list[str]:
    """A tenant that comes, is served beside others, and goes."""
    guest = f"guest-{threading.get_ident()}"
    load_tenant(own.model, own.guest, guest)
    try:
        names, prompts = mixed(own, rng)
        return wrong_rows(own, [guest, *names], [rng.randrange(len(PROMPTS)), *prompts], rng)
    finally:
        own.model.delete_adapter(guest)


KINDS: dict[str, tuple[Callable[[Service, random.Random], list[str]], int]] = {
    "served": (served, 60),
    "timed out": (timed_out, 10),
    "interrupted": (interrupted, 20),
    "tenant that came and went": (visited, 10),
}
"""What a call does, and how many of a hundred do it."""


def state_of_thread(model: PeftModel) -> dict[str, Any]:
    """Returns what a call may have left in the state of the calling thread."""
    tuner: Any = model.base_model
    state = vars(tuner._blocks.state) if hasattr(tuner, "_blocks") else vars(tuner._batches.current)
    gate = tuner.call_gate
    return {name: value for name, value in {**state, **vars(gate._own)}.items() if value}


def lasting(model: PeftModel) -> dict[str, Any]:
    """Returns what calls must leave as it is."""
    tuner: Any = model.base_model
    return {
        "hooks": num_hooks(model),
        "adapters": sorted(model.peft_config),
        "weights": {name: value.double().sum().item() for name, value in sorted(model.state_dict().items())},
        "gate": (tuner.call_gate._calls, tuner.call_gate._closers),
    }


class Worker(threading.Thread):
    """A thread that makes calls."""

    def __init__(self, services: list[Service], seed: str, calls: int) -> None:
        super().__init__()
        self.services, self.rng, self.calls = services, random.Random(seed), calls
        self.counts: Counter[str] = Counter()
        self.reports: list[str] = []

    def run(self) -> None:
        names = list(KINDS)
        for _ in range(self.calls):
            own = self.rng.choice(self.services)
            kind = self.rng.choices(names, [share for _, share in KINDS.values()])[0]
            try:
                self.reports += KINDS[kind][0](own, self.rng)
            except Exception as error:
                self.reports.append(f"{own.name}, {kind}: {type(error).__name__}: {error}"[:500])
            if left := state_of_thread(own.model):
                self.reports.append(f"{own.name}, {kind}: left {left} in the thread's state")
            self.counts[kind] += 1


def resident() -> int:
    """Returns the bytes of this process's memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def soak(seed: int, calls: int, rounds: int = 10) -> dict[str, Any]:
    """Makes calls in rounds, the first of which warms up. Returns how many, what was wrong, and the memory after each."""
    counts: Counter[str] = Counter()
    reports: list[str] = []
    memory: dict[str, list[int]] = {"resident_bytes": [], "tensor_bytes": [], "objects": []}
    Interruptions.raised.clear()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        services = [service(*kind, Path(scratch, str(number))) for number, kind in enumerate(SERVICES)]
        before = [lasting(own.model) for own in services]
        for part in range(rounds):
            workers = [
                Worker(services, f"{seed} {part} {number}", calls // rounds // THREADS) for number in range(THREADS)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
                counts += worker.counts
                reports += worker.reports
            del worker, workers
            for own in services:
                with own.model.base_model.call_gate.closed():  # drops the stacks of the last batch
                    pass
            gc.collect()
            memory["resident_bytes"].append(resident())
            memory["tensor_bytes"].append(tensor_bytes())
            memory["objects"].append(len(gc.get_objects()))
        for own, first in zip(services, before, strict=True):
            last = lasting(own.model)
            reports += [
                f"{own.name}: {key} is {last[key]}, not {first[key]}" for key in last if last[key] != first[key]
            ]
    growth = {name: max(values[1:]) / values[0] - 1 for name, values in memory.items()}
    seconds = round(time.monotonic() - start)
    raised = len(Interruptions.raised)
    return {
        "seed": seed,
        "calls": counts,
        "raised": raised,
        "reports": reports,
        "growth": growth,
        **memory,
        "seconds": seconds,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", type=int, default=3_000)
    parser.add_argument("--results", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sys.setswitchinterval(1e-4)
    warnings.simplefilter("ignore")
    found = soak(options.seed, options.calls)
    print("\n".join(found["reports"]))
    print(json.dumps({name: value for name, value in found.items() if name != "reports"}, indent=1))
    if options.results:
        from machine import facts

        options.results.write_text(json.dumps({"machine": facts(), **found}, indent=1) + "\n")
    sys.exit(1 if found["reports"] or max(found["growth"].values()) > 0.02 else 0)
