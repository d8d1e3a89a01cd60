"""Serves many tenants with vLLM: FanLoRA adapters exported as plain LoRA, and PARA adapters.

`train` finds a setting by role, trains a FanLoRA adapter with this setting and a PARA adapter for each tenant, and
saves the adapters and their answers. `serve` and `http` need vLLM and can run in another environment. `serve` checks
that vLLM generates the same tokens in one batch with the base model, and compares the time of this batch with LoRA on
all linear layers. `http` starts vLLM's server and sends requests to the PARA tenants by their model names.

    python examples/serve_vllm.py train
    python examples/serve_vllm.py serve
    python examples/serve_vllm.py http
"""

import copy
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import assets
import torch
import typer
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from training import BATCH_SIZE, sft_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTTrainer

from peft_fanlora import FanLoraConfig, ParaConfig, export_lora
from peft_fanlora.fanlora.modules import vllm_layers


sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import machine


if TYPE_CHECKING:
    from vllm import LLM
    from vllm.lora.request import LoRARequest

RANK = 8
KEEP = 2
NUM_CALIBRATION = 8
LEARNING_RATE = 1e-3
BY_ROLE, BY_LAYER, EVERYWHERE = "FanLoRA by role", "FanLoRA by layer", "LoRA on all linear layers"
PARA = "PARA"
START_SECONDS = 300
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
console = Console()
Output = Annotated[Path, typer.Option(help="Folder of the adapters and their answers")]


@dataclass
class Tenants:
    """Adapters, with the prompt of each tenant and the answer of its adapter in transformers (token ids)."""

    name: str
    folders: list[str]
    prompts: list[list[int]]
    answers: list[list[int]]


@dataclass
class Served:
    """An engine, with a batch of prompts and their adapters, and the measured times of this batch."""

    name: str
    engine: "LLM"
    prompts: list[list[int]]
    adapters: "list[LoRARequest | None]"
    seconds: list[float] = field(default_factory=list)


def train_adapter(
    base_model: str, config: PeftConfig, rows: list[assets.Row], steps: int, output: Path, seed: int
) -> tuple[PeftModel, SFTTrainer]:
    """Trains an adapter on the rows after the first `NUM_CALIBRATION`, which are the trainer's evaluation dataset."""
    set_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32), config)
    trainer = SFTTrainer(
        model,
        args=sft_arguments(output, steps, LEARNING_RATE, seed),
        processing_class=AutoTokenizer.from_pretrained(base_model),
        train_dataset=Dataset.from_list(rows[NUM_CALIBRATION:]),
        eval_dataset=Dataset.from_list(rows[:NUM_CALIBRATION]),
    )
    trainer.train()
    return model.eval(), trainer


def answer(model: PeftModel, prompt: list[int], new_tokens: int) -> list[int]:
    """Returns the tokens that follow a prompt with greedy decoding, ignoring the end-of-sequence token."""
    inputs = torch.tensor([prompt], device=model.device)
    lengths = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens}
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, pad_token_id=0, **lengths
    )
    return output[0, len(prompt) :].tolist()


@app.command()
def train(
    model: Annotated[str, typer.Option(help="Folder or Hub id of a chat model [default: SmolLM2-135M-Instruct]")] = "",
    output: Output = Path("serve-output"),
    tenants: Annotated[int, typer.Option(help="Number of adapters", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Training steps before the modules are scored")] = 20,
    tenant_steps: Annotated[int, typer.Option(help="Training steps of each tenant")] = 4,
    new_tokens: Annotated[int, typer.Option(help="Length of the answers in tokens")] = 32,
    seed: Annotated[int, typer.Option(help="Seed")] = 0,
) -> None:
    """Finds a setting by role, trains and saves the adapters of the tenants, and stores their answers."""
    base_model = model or str(assets.model_folder())
    tokenizer = AutoTokenizer.from_pretrained(base_model)
    size = NUM_CALIBRATION + tenant_steps * BATCH_SIZE
    tasks = definitions, _ = assets.glosses(), assets.sentiment()
    rows = [tasks[tenant % 2][tenant * size : (tenant + 1) * size] for tenant in range(tenants)]
    prompts = [
        tokenizer.apply_chat_template(own[0]["prompt"], add_generation_prompt=True, return_dict=False) for own in rows
    ]
    shape: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "task_type": "CAUSAL_LM"}

    console.rule("LoRA on all linear layers, and the setting by role")
    instructions = definitions[tenants * size :][: NUM_CALIBRATION + steps * BATCH_SIZE]
    general, trainer = train_adapter(base_model, FanLoraConfig(**shape), instructions, steps, output, seed)
    scores = general.score_modules(trainer.get_eval_dataloader(), num_points=4)
    setting = scores.select(strategy="role", keep=KEEP)
    console.print(f"Kept roles: {', '.join(setting.roles)}", highlight=False)

    def served_alike(name: str) -> Tenants:
        """Exports one adapter for all tenants. The engine's cost is the same as with different adapters."""
        folder = output / name.replace(" ", "-").lower()
        export_lora(general, folder)
        answers = [answer(general, prompt, new_tokens) for prompt in prompts]
        return Tenants(name, [str(folder.resolve())] * tenants, prompts, answers)

    groups = [served_alike(EVERYWHERE)]
    with general.disable_adapter():
        base_answers = [answer(general, prompt, new_tokens) for prompt in prompts]
    general.prune_modules(scores.select(keep=KEEP))
    groups.append(served_alike(BY_LAYER))

    own_adapters, prompt_aware = Tenants(BY_ROLE, [], prompts, []), Tenants(PARA, [], prompts, [])
    ways: list[tuple[Tenants, str, PeftConfig, Callable[[PeftModel, Path], object]]] = [
        (own_adapters, "tenant", FanLoraConfig(setting=setting, **shape), export_lora),
        (prompt_aware, "para-tenant", ParaConfig(task_type="CAUSAL_LM"), PeftModel.save_pretrained),
    ]
    for tenant in range(tenants):
        for group, name, config, save in ways:
            console.rule(f"Tenant {tenant + 1} of {tenants}: {group.name}")
            adapter, _ = train_adapter(
                base_model, copy.deepcopy(config), rows[tenant], tenant_steps, output, seed + tenant
            )
            folder = output / f"{name}-{tenant}"
            save(adapter, folder)
            group.folders.append(str(folder.resolve()))
            group.answers.append(answer(adapter, prompts[tenant], new_tokens))
    groups += [own_adapters, prompt_aware]
    content = {"base_model": base_model, "base_answers": base_answers, "groups": [asdict(group) for group in groups]}
    (output / "tenants.json").write_text(json.dumps(content) + "\n")
    console.print(
        f"The adapters and answers are in {output}/. Run this in vLLM's environment: python {sys.argv[0]} serve --output {output}"
    )


def layers_of_vllm(folders: Iterable[str]) -> list[str]:
    """Returns the layers of vLLM's Llama that the adapters change, for `lora_target_modules`."""
    configs = [json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in set(folders)]
    return vllm_layers(module for config in configs for module in config["target_modules"])


def tokens_of(served: Served, new_tokens: int) -> list[list[int]]:
    """Returns the answers to all prompts, generated in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in served.prompts]
    outputs = served.engine.generate(inputs, sampling, lora_request=served.adapters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def start_all(base_model: str, groups: dict[str, Tenants]) -> list[Served]:
    """Starts engines without LoRA, with LoRA in all layers (vLLM's default) or in the adapted layers, and with PARA."""
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    prompts = groups[BY_ROLE].prompts
    ids = iter(range(1, 1_000))  # vLLM treats each id as a different adapter
    requests: dict[str, list[LoRARequest | None]] = {
        name: [
            LoRARequest(f"adapter-{index}", index, folder) for folder, index in zip(group.folders, ids, strict=False)
        ]
        for name, group in groups.items()
    }

    def start(*names: str, **options: Any) -> LLM:
        # On CPUs, vLLM applies the last slot to requests without an adapter, so one more slot is kept empty.
        slots = sum(len(requests[name]) for name in names) + 1
        lora = {"enable_lora": True, "max_loras": slots, "max_lora_rank": RANK} if names else {}
        longest = max(map(len, prompts)) + len(groups[BY_ROLE].answers[0])
        console.print(f"Starting an engine for {' and '.join(names) or 'the base model'}")
        return LLM(
            base_model, dtype="float32", enforce_eager=True, skip_tokenizer_init=True, enable_prefix_caching=False,
            max_model_len=longest, max_num_seqs=len(prompts) + 1, kv_cache_memory_bytes=2**28, **lora, **options,
        )  # fmt: skip

    bare, plain = start(), start(EVERYWHERE, BY_ROLE)
    served = [Served(name, bare, prompts, [None] * len(prompts)) for name in ("base model", "base model, again")]
    served += [Served(f"{name}, vLLM as it comes", plain, prompts, requests[name]) for name in (EVERYWHERE, BY_ROLE)]
    for name in (EVERYWHERE, BY_ROLE, BY_LAYER):
        engine = start(name, lora_target_modules=layers_of_vllm(groups[name].folders))
        served.append(Served(f"{name}, lora_target_modules", engine, prompts, requests[name]))
    served.append(Served(PARA, start(PARA, additional_config={"para": {}}), prompts, requests[PARA]))
    return served


def check(served: Served, group: Tenants, base_answer: list[int]) -> None:
    """Compares vLLM's answers with those of transformers, in one batch with a request to the base model.

    Raises:
        RuntimeError: a token differs.
    """
    mixed = Served(served.name, served.engine, [*served.prompts, served.prompts[0]], [*served.adapters, None])
    expected = [*group.answers, base_answer]
    found = tokens_of(mixed, len(base_answer))
    names = [*(f"tenant {row}" for row in range(len(group.answers))), "the base model"]
    for name, own, other in zip(names, expected, found, strict=True):
        if own != other:
            raise RuntimeError(
                f"{served.name}: the tokens of {name} are {other} in vLLM, but {own} in transformers. Run `train` "
                "again if the adapters were changed; otherwise report this."
            )


def measure(served: list[Served], rounds: int, new_tokens: int) -> None:
    """Times one batch of each engine per round, in random order; the first round is discarded."""
    order = list(served)
    for _ in range(rounds + 1):
        for each in order:
            started = time.perf_counter()
            tokens_of(each, new_tokens)
            each.seconds.append(time.perf_counter() - started)
        random.shuffle(order)
    for each in served:
        del each.seconds[0]


def num_lora_layers(engine: "LLM") -> int:
    """Returns the number of layers of an engine that compute LoRA."""
    from vllm.lora.layers import BaseLayerWithLoRA

    (count,) = engine.apply_model(lambda model: sum(isinstance(part, BaseLayerWithLoRA) for part in model.modules()))
    return count


def summary(served: Served, base: Served, new_tokens: int) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(served.seconds, base.seconds, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4)
    return {
        "variant": served.name,
        "lora_layers": num_lora_layers(served.engine),
        "tokens_per_second": round(len(served.prompts) * new_tokens / statistics.median(served.seconds), 1),
        "median_ratio": round(median, 3),
        "ratio_quartiles": [round(lower, 3), round(upper, 3)],
    }


@app.command()
def serve(
    output: Output = Path("serve-output"),
    rounds: Annotated[int, typer.Option(help="Timed batches of each variant", min=2)] = 5,
    result: Annotated[Path | None, typer.Option(help="JSON file for the results")] = None,
) -> None:
    """Serves the tenants with vLLM, checks the answers, and compares the speed with LoRA on all linear layers."""
    # All engines run in this process.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm

    load = os.getloadavg()[0]
    content = json.loads((output / "tenants.json").read_text())
    groups = {group["name"]: Tenants(**group) for group in content["groups"]}
    base_answers, prompts, answers = content["base_answers"], groups[BY_ROLE].prompts, groups[BY_ROLE].answers
    new_tokens = len(answers[0])
    base, _, *others = served = start_all(content["base_model"], groups)
    for each in others:
        check(each, groups[each.name.partition(",")[0]], base_answers[0])
    console.print(
        f"{len(others)} batches of {len(prompts)} tenants and the base model: all tokens are the same as in transformers."
    )

    measure(served, rounds, new_tokens)
    results = [summary(each, base, new_tokens) for each in served]
    title = f"{len(prompts)} tenants in one batch, {new_tokens} tokens each"
    table = Table("", "layers with LoRA", "tokens/s", "time / base", "quartiles", title=title)
    for row in results:
        quartiles = "-".join(f"{value:.2f}" for value in row["ratio_quartiles"])
        figures = (row["lora_layers"], row["tokens_per_second"], f"{row['median_ratio']:.2f}", quartiles)
        table.add_row(row["variant"], *map(str, figures))
    console.print(table)
    if result is not None:
        facts = {
            "model": Path(content["base_model"]).name,
            "tenants": len(prompts),
            "rank": RANK,
            "prompt_lengths": [len(prompt) for prompt in prompts],
            "new_tokens": new_tokens,
            "rounds": rounds,
            "layers_by_role": sorted({layer.rpartition(".")[2] for layer in layers_of_vllm(groups[BY_ROLE].folders)}),
            "answers_unlike_the_base_model": sum(own != base for own, base in zip(answers, base_answers, strict=True)),
            "load_before": round(load, 2),
            "machine": machine.facts() | {"vllm": vllm.__version__},
        }
        result.parent.mkdir(parents=True, exist_ok=True)
        result.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


@app.command()
def http(
    output: Output = Path("serve-output"), port: Annotated[int, typer.Option(help="Port of the server")] = 8321
) -> None:
    """Starts vLLM's server with the PARA tenants, and compares the answers to one request each with transformers."""
    import openai

    content = json.loads((output / "tenants.json").read_text())
    group = next(Tenants(**group) for group in content["groups"] if group["name"] == PARA)
    names = [f"tenant-{number}" for number in range(len(group.folders))]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", content["base_model"]]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    longest = max(len(prompt) + len(own) for prompt, own in zip(group.prompts, group.answers, strict=True))
    command += ["--max-model-len", str(longest), "--kv-cache-memory-bytes", str(2**28)]
    command += ["--enable-lora", "--max-loras", str(len(names)), "--additional-config", json.dumps({"para": {}})]
    command += ["--lora-modules", *(f"{name}={folder}" for name, folder in zip(names, group.folders, strict=True))]
    server = subprocess.Popen(command)
    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.models.list()
                break
            except openai.APIConnectionError:
                if server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(
                        f"vLLM's server on port {port} did not start within {START_SECONDS} seconds: see its output "
                        "above, or pass another --port."
                    ) from None
                time.sleep(1)

        def ask(name: str, prompt: list[int], own: list[int]) -> list[int]:
            extra = {"ignore_eos": True, "return_token_ids": True}
            done = client.completions.create(
                model=name, prompt=prompt, max_tokens=len(own), temperature=0, extra_body=extra
            )
            return list(done.choices[0].model_extra["token_ids"])

        with ThreadPoolExecutor(len(names)) as clients:
            found = list(clients.map(ask, names, group.prompts, group.answers))
    finally:
        server.terminate()
        server.wait()
    for name, own, other in zip(names, group.answers, found, strict=True):
        if own != other:
            raise RuntimeError(
                f"The tokens of {name} are {other} over HTTP, but {own} in transformers. Run `train` again if the "
                "adapters were changed; otherwise report this."
            )
    console.print(f"{len(names)} PARA tenants over HTTP: all tokens are the same as in transformers.")


if __name__ == "__main__":
    app()
