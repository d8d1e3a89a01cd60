"""Times vLLM with PARA, FanLoRA and LoRA tenants relative to the base model.

All engines run in this process, and their steps alternate, so that other load on the machine affects all of them
equally. On a CPU, one thread computes everything, and its CPU time is measured.

    .venv-vllm/bin/python benchmarks/vllm_serving.py --result benchmarks/results/vllm-serving-cpu.json

On a GPU, `--device cuda` synchronizes the device and measures wall-clock time. It needs an environment with vLLM and
peft-fanlora.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import machine
import torch
import typer
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed

from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, export_lora


sys.path.append(str(Path(__file__).parent.parent / "examples"))
import assets
from serve_vllm import layers_of_vllm


if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

SETTING = Path(__file__).parent.parent / "examples" / "smollm2-setting"
BASE, AGAIN = "base model", "base model, again"
RANK = 8
ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VOCAB = 1_000
"""Prompts are random tokens below this id."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()


@dataclass
class Contestant:
    """An engine, and the adapters that its requests use in turn."""

    name: str
    engine: "LLM"
    adapters: "list[LoRARequest | None]"
    answered: int = 0
    numbers: Iterator[int] = field(default_factory=lambda: iter(range(10**9)))

    def add(self, prompt: list[int], new_tokens: int) -> None:
        """Adds a request to the engine."""
        from vllm import SamplingParams

        number = next(self.numbers)
        sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        adapter = self.adapters[number % len(self.adapters)]
        self.engine.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling, lora_request=adapter)

    def step(self) -> None:
        """Runs one step of the engine."""
        self.answered += sum(output.finished for output in self.engine.llm_engine.step())

    def drain(self) -> None:
        """Runs steps until all requests are finished."""
        while self.engine.llm_engine.has_unfinished_requests():
            self.step()


def save_adapters(model: str, folder: Path) -> dict[str, Path]:
    """Saves one untrained adapter of each method and returns the folders. The times do not depend on the weights."""
    set_seed(0)

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)

    get_peft_model(base(), ParaConfig(task_type="CAUSAL_LM", init_para_weights=False)).save_pretrained(folder / "para")
    lora: dict[str, Any] = {"r": RANK, "lora_alpha": RANK, "task_type": "CAUSAL_LM"}
    export_lora(
        get_peft_model(base(), FanLoraConfig(setting=FanLoraSetting.from_pretrained(SETTING), **lora)),
        folder / "fanlora",
    )
    get_peft_model(base(), LoraConfig(target_modules="all-linear", **lora)).save_pretrained(folder / "lora")
    return {name: folder / name for name in ("para", "fanlora", "lora")}


def start(model: str, folders: dict[str, Path], rows: int, tenants: list[int], device: str) -> list[Contestant]:
    """Starts the engines: the base model twice, PARA with several numbers of tenants, FanLoRA and LoRA with eight."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    def engine(**options: Any) -> "LLM":
        memory: dict[str, Any] = {"kv_cache_memory_bytes": 2**28}
        return LLM(
            model, dtype="float32" if device == "cpu" else "bfloat16", enforce_eager=True, skip_tokenizer_init=True,
            enable_prefix_caching=False, max_model_len=1024, max_num_seqs=rows, max_num_batched_tokens=2048,
            **memory, **options,
        )  # fmt: skip

    ids = iter(range(1, 10_000))

    def requests(method: str, count: int) -> "list[LoRARequest | None]":
        return [LoRARequest(f"{method}-{number}", number, str(folders[method])) for number in islice(ids, count)]

    found = [Contestant(name, engine(), [None]) for name in (BASE, AGAIN)]
    para = {"enable_lora": True, "additional_config": {"para": {}}}
    for count in tenants:
        name = f"PARA, {count} tenant{'s' if count > 1 else ''}"
        found.append(Contestant(name, engine(max_loras=count, **para), requests("para", count)))
    layers = {"fanlora": layers_of_vllm([str(folders["fanlora"])]), "lora": ROLES}
    names = {"fanlora": "FanLoRA, 8 tenants, lora_target_modules", "lora": "LoRA, 8 tenants, all linear"}
    for method, name in names.items():
        # On CPUs, vLLM applies the last slot to requests without an adapter, so one more slot is kept empty.
        options = {"max_loras": 9, "max_lora_rank": RANK, "lora_target_modules": layers[method]}
        found.append(Contestant(name, engine(enable_lora=True, **options), requests(method, 8)))
    return found


def prompt(length: int, source: random.Random) -> list[int]:
    """Returns `length` random token ids."""
    return [source.randrange(3, VOCAB) for _ in range(length)]


def stopwatch(device: str) -> Callable[[], float]:
    """Returns a clock in seconds: CPU time of this thread, or wall-clock time after a synchronization of the GPU."""

    def synchronized() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return time.thread_time if device == "cpu" else synchronized


Times = dict[str, list[float]]


def in_turns(
    contestants: list[Contestant], rounds: int, clock: Callable[[], float], act: Callable[[Contestant], None]
) -> Times:
    """Returns the seconds of `act` for each contestant and round, in random order; the first round is discarded."""
    times: Times = {each.name: [] for each in contestants}
    order, source = list(contestants), random.Random(0)
    for _ in range(rounds + 1):
        for each in order:
            started = clock()
            act(each)
            times[each.name].append(clock() - started)
        source.shuffle(order)
    return {name: own[1:] for name, own in times.items()}


def decoding(contestants: list[Contestant], rows: int, rounds: int, clock: Callable[[], float]) -> Times:
    """Times steps that compute one token of each row."""
    for each in contestants:
        source = random.Random(1)
        for _ in range(rows):
            each.add(prompt(40, source), rounds + 10)
        for _ in range(3):
            each.step()
    times = in_turns(contestants, rounds, clock, Contestant.step)
    for each in contestants:
        each.drain()
    return times


def prefill(contestants: list[Contestant], lengths: list[int], rounds: int, clock: Callable[[], float]) -> Times:
    """Times the prefill of prompts of the given lengths, up to the first token of each answer."""
    source = random.Random(2)

    def act(each: Contestant) -> None:
        for length in lengths:
            each.add(prompt(length, source), 1)
        each.drain()

    return in_turns(contestants, rounds, clock, act)


def mixed(contestants: list[Contestant], count: int, rounds: int, clock: Callable[[], float]) -> Times:
    """Times `count` requests that arrive while others run, with prompts and answers of different lengths."""

    def act(each: Contestant) -> None:
        source = random.Random(3)
        arrivals = sorted(source.uniform(0, 2 * count) for _ in range(count))
        step = 0
        while arrivals or each.engine.llm_engine.has_unfinished_requests():
            while arrivals and arrivals[0] <= step:
                arrivals.pop(0)
                each.add(prompt(source.randint(10, 120), source), source.randint(4, 40))
            each.step()
            step += 1

    return in_turns(contestants, rounds, clock, act)


def summary(measure: str, rows: int, times: Times) -> list[dict[str, Any]]:
    """Returns each contestant's median time, and median and quartiles of its ratios to the base model per round."""
    results = []
    for name, own in times.items():
        ratios = [mine / base for mine, base in zip(own, times[BASE], strict=True)]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        results.append(
            {
                "measure": measure,
                "rows": rows,
                "variant": name,
                "median_ms": round(1000 * statistics.median(own), 3),
                "ratio": round(median, 3),
                "ratio_quartiles": [round(lower, 3), round(upper, 3)],
            }
        )
    return results


def show(results: list[dict[str, Any]]) -> None:
    """Prints the ratios of each measure."""
    measures = list(dict.fromkeys(row["measure"] for row in results))
    table = Table("", *measures, title="time / base model's, median and quartiles")
    for variant in dict.fromkeys(row["variant"] for row in results):
        own = {row["measure"]: row for row in results if row["variant"] == variant}
        cells = [
            f"{own[m]['ratio']:.2f} ({own[m]['ratio_quartiles'][0]:.2f}-{own[m]['ratio_quartiles'][1]:.2f})"
            for m in measures
        ]
        table.add_row(variant, *cells)
    console.print(table)


@app.command()
def main(
    model: Annotated[str, typer.Option(help="Folder or Hub id [default: SmolLM2-135M-Instruct]")] = "",
    rounds: Annotated[int, typer.Option(help="Timed steps of each engine", min=2)] = 100,
    loads: Annotated[int, typer.Option(help="Timed mixed loads of each engine", min=2)] = 5,
    requests: Annotated[int, typer.Option(help="Number of requests of a mixed load")] = 24,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    result: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Times decoding steps, prefills and a mixed load, and prints the ratios to the base model."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all engines run in this process
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        torch.set_num_threads(1)  # so that the CPU time of this thread covers all work
    import vllm

    base = model or str(assets.model_folder())
    load = os.getloadavg()[0]
    clock = stopwatch(device)
    with tempfile.TemporaryDirectory() as folder:
        contestants = start(base, save_adapters(base, Path(folder)), 32, [1, 8, 32], device)
        results: list[dict[str, Any]] = []
        several = max(rounds // 4, 2)
        measures: list[tuple[str, int, Callable[[], Times]]] = [
            ("decode, 8 rows", 8, lambda: decoding(contestants, 8, rounds, clock)),
            ("decode, 32 rows", 32, lambda: decoding(contestants, 32, rounds, clock)),
            ("prefill, 8 x 40", 8, lambda: prefill(contestants, [40] * 8, several, clock)),
            ("prefill, 200", 1, lambda: prefill(contestants, [200], several, clock)),
            (f"{requests} arrivals", 32, lambda: mixed(contestants, requests, loads, clock)),
        ]
        facts = {
            "model": Path(base).name,
            "dtype": "float32" if device == "cpu" else "bfloat16",
            "device": device,
            "rank": RANK,
            "fanlora_setting": SETTING.name,
            "rounds": rounds,
            "load_before": round(load, 2),
            "machine": machine.facts() | {"vllm": vllm.__version__},
        }
        for measure, rows, times in measures:
            results += summary(measure, rows, times())
            show(results[-len(contestants) :])
            if result is not None:  # after each measure, since the last ones take long
                result.parent.mkdir(parents=True, exist_ok=True)
                result.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")
    show(results)


if __name__ == "__main__":
    app()
