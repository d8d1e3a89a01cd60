"""Exported adapters in vLLM: all tokens equal those of transformers. Run by `make test-vllm`.

The tests also check the statements about vLLM in docs/vllm.md, so they fail if another version behaves differently.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import assets
import pytest
import torch
from peft import get_peft_model
from serve_vllm import app, layers_of_vllm
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from typer.testing import CliRunner

from integration_tests.helpers.models import randomize
from peft_fanlora import FanLoraConfig, FanLoraSetting, ParaConfig, export_lora


os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # engines run in this process, where the tests can access them
pytestmark = pytest.mark.vllm

NEW_TOKENS = 12
NUM_LAYERS = 3
SHAPE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,  # head size 32, which vLLM's CPU attention supports
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
ROLES = ["self_attn.v_proj", "mlp.up_proj", "self_attn.o_proj", "mlp.down_proj"]

SETTINGS: dict[str, dict[str, Any]] = {
    "all linear layers": {},
    "by role": {"target_modules": ["v_proj", "up_proj"]},
    "another role in each layer": {
        "target_modules": [f"model.layers.{layer}.{ROLES[layer]}" for layer in range(NUM_LAYERS)]
    },
    "a higher rank, rsLoRA": {"r": 16, "use_rslora": True, "target_modules": ["q_proj", "gate_proj"]},
    "rank and alpha patterns": {"rank_pattern": {"up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
}


@dataclass(frozen=True)
class Tenant:
    """An exported adapter, a prompt, and the reference answer from transformers (token ids)."""

    folder: str
    prompt: list[int]
    answer: list[int]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


@torch.no_grad()
def continuation(model: nn.Module, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    for _ in range(NEW_TOKENS):
        tokens = torch.cat((tokens, model(tokens).logits[:, -1:].argmax(-1)), dim=1)
    return tokens[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def tenants(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tenant]:
    made = {}
    for seed, (name, setting) in enumerate(SETTINGS.items()):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        prompt = torch.randint(3, 128, (5 + seed,), generator=torch.Generator().manual_seed(seed)).tolist()
        if not made:
            made["base model"] = Tenant("", prompt, continuation(model, prompt))
        adapter = get_peft_model(
            model, FanLoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM", **setting})
        )
        randomize(adapter, seed=seed)
        folder = tmp_path_factory.mktemp("adapter")
        export_lora(adapter.eval(), folder)
        made[name] = Tenant(str(folder), prompt, continuation(adapter, prompt))
    assert len({tuple(tenant.answer) for tenant in made.values()}) == len(made)
    return made


def engine(base: Path, **options: Any) -> Any:
    from vllm import LLM

    return LLM(
        str(base),
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=8,
        kv_cache_memory_bytes=2**24,
        enable_lora=True,
        max_lora_rank=16,
        **options,
    )


def answers(llm: Any, tenants: dict[str, Tenant]) -> dict[str, list[int]]:
    """Returns the answers of all tenants, served in one batch."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = [
        LoRARequest(name, number, tenant.folder) if tenant.folder else None
        for number, (name, tenant) in enumerate(tenants.items(), start=1)
    ]
    prompts = [{"prompt_token_ids": tenant.prompt} for tenant in tenants.values()]
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, detokenize=False)
    outputs = llm.generate(prompts, sampling, lora_request=adapters, use_tqdm=False)
    return {name: list(output.outputs[0].token_ids) for name, output in zip(tenants, outputs, strict=True)}


def lora_layers(llm: Any) -> list[str]:
    from vllm.lora.layers import BaseLayerWithLoRA

    (names,) = llm.apply_model(
        lambda model: [name for name, part in model.named_modules() if isinstance(part, BaseLayerWithLoRA)]
    )
    return names


def choose(tenants: dict[str, Tenant], *names: str) -> dict[str, Tenant]:
    return {name: tenants[name] for name in names}


def expected(tenants: dict[str, Tenant]) -> dict[str, list[int]]:
    return {name: tenant.answer for name, tenant in tenants.items()}


def test_tenants_with_different_settings_and_the_base_model_in_one_batch(
    base: Path, tenants: dict[str, Tenant]
) -> None:
    llm = engine(base, max_loras=len(tenants))
    assert answers(llm, tenants) == expected(tenants)
    # By default, vLLM computes LoRA in all linear layers, the embeddings and the head, for any adapter.
    assert len(lora_layers(llm)) >= 4 * NUM_LAYERS + 2


@pytest.mark.parametrize(
    ("name", "count"), [("by role", 2 * NUM_LAYERS), ("another role in each layer", NUM_LAYERS)], ids=str
)
def test_lora_target_modules_keeps_lora_to_the_layers_of_the_adapters(
    name: str, count: int, base: Path, tenants: dict[str, Tenant]
) -> None:
    few = choose(tenants, name, "base model")
    layers = layers_of_vllm([tenants[name].folder])
    llm = engine(base, max_loras=2, lora_target_modules=layers)
    assert answers(llm, few) == expected(few)
    assert sorted(lora_layers(llm)) == layers
    assert len(layers) == count


def test_names_of_roles_do_as_well(base: Path, tenants: dict[str, Tenant]) -> None:
    few = choose(tenants, "by role", "base model")
    roles = FanLoraSetting.from_modules(
        LlamaForCausalLM.from_pretrained(base),
        [f"model.layers.{layer}.{role}" for layer in range(NUM_LAYERS) for role in ROLES[:2]],
    ).roles
    llm = engine(base, max_loras=2, lora_target_modules=[role.rpartition(".")[2] for role in roles])
    assert answers(llm, few) == expected(few)
    assert sorted(lora_layers(llm)) == layers_of_vllm([tenants["by role"].folder])


def test_an_adapter_with_other_layers_loses_them_without_an_error(base: Path, tenants: dict[str, Tenant]) -> None:
    few = choose(tenants, "by role", "another role in each layer")
    llm = engine(base, max_loras=3, lora_target_modules=["v_proj", "up_proj"])
    found = answers(llm, few)
    assert found["by role"] == tenants["by role"].answer
    assert found["another role in each layer"] != tenants["another role in each layer"].answer


@pytest.mark.xfail(
    raises=AssertionError,
    strict=True,
    reason="vLLM's operators for CPUs read the last slot for requests without an adapter",
)
def test_the_base_model_beside_as_many_adapters_as_slots(base: Path, tenants: dict[str, Tenant]) -> None:
    few = choose(tenants, "by role", "base model")
    assert answers(engine(base, max_loras=1), few) == expected(few)


def test_a_classification_head_goes_along(tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SHAPE, num_labels=3, pad_token_id=0))
    classifier.save_pretrained(tmp_path / "base")
    adapter = get_peft_model(classifier, FanLoraConfig(r=4, task_type="SEQ_CLS")).eval()
    randomize(adapter)
    nn.init.normal_(adapter.get_base_model().score.modules_to_save["default"].weight)
    export_lora(adapter, tmp_path / "adapter")
    prompt = list(range(5, 15))
    with torch.no_grad():
        (probabilities,) = adapter(torch.tensor([prompt])).logits.softmax(-1).tolist()
        with adapter.disable_adapter():
            (without,) = adapter(torch.tensor([prompt])).logits.softmax(-1).tolist()
    llm = engine(tmp_path / "base", runner="pooling", max_loras=2)
    inputs = [{"prompt_token_ids": prompt}] * 2
    tenant = LoRARequest("classifier", 1, str(tmp_path / "adapter"))
    outputs = llm.classify(inputs, lora_request=[tenant, None], use_tqdm=False)
    assert outputs[0].outputs.probs == pytest.approx(probabilities, abs=1e-5)
    assert outputs[1].outputs.probs == pytest.approx(without, abs=1e-5)
    assert probabilities != pytest.approx(without, abs=1e-2)


def test_para_is_not_readable(base: Path, tmp_path: Path) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    para = get_peft_model(LlamaForCausalLM.from_pretrained(base), ParaConfig(r=2, task_type="CAUSAL_LM"))
    para.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lora_alpha"):
        PEFTHelper.from_local_dir(str(tmp_path), None)


def test_the_example_trains_and_serves(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets.model_folder())
    tokenizer.save_pretrained(tmp_path / "model")
    config = LlamaConfig(**{**SHAPE, "vocab_size": len(tokenizer), "max_position_embeddings": 256})
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    few = ["--tenants", "2", "--steps", "1", "--tenant-steps", "1", "--new-tokens", "3"]
    result = tmp_path / "result.json"
    for command in (
        ["train", "--model", tmp_path / "model", "--output", tmp_path / "out", *few],
        ["http", "--output", tmp_path / "out"],
        ["serve", "--output", tmp_path / "out", "--rounds", "2", "--result", result],
    ):
        done = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
        assert done.exit_code == 0, done.output
    shown = " ".join(done.output.split())  # a terminal breaks the line
    assert "batches of 2 tenants and the base model: all tokens are the same as in transformers" in shown
    layers = {row["variant"]: row["lora_layers"] for row in json.loads(result.read_text())["results"]}
    assert layers["FanLoRA by role, lora_target_modules"] < layers["LoRA on all linear layers, lora_target_modules"]
