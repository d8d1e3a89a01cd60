"""The part of the vLLM example that needs no vLLM: it trains tenants by role, exports them and keeps their answers."""

import json
from pathlib import Path

import pytest
import serve_vllm
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from integration_tests.helpers.chat import save_tiny_chat_model


pytestmark = pytest.mark.xdist_group("serving_example")  # one worker makes what its tests share


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `serve_vllm.py train` leaves for a tiny chat model."""
    folder = tmp_path_factory.mktemp("serving")
    save_tiny_chat_model(folder / "model")
    few = ["--tenants", "2", "--steps", "1", "--tenant-steps", "1", "--new-tokens", "3"]
    arguments = ["train", "--model", str(folder / "model"), "--output", str(folder / "out"), *few]
    done = CliRunner().invoke(serve_vllm.app, arguments)
    assert done.exit_code == 0, done.output
    return folder / "out"


def test_the_tenants_adapters_are_plain_lora_on_two_roles(output: Path) -> None:
    group = next(group for group in groups(output) if group["name"] == serve_vllm.BY_ROLE)
    assert len(set(group["folders"])) == 2
    chosen = [json.loads((Path(folder) / "adapter_config.json").read_text()) for folder in group["folders"]]
    for config in chosen:
        assert config["peft_type"] == "LORA"
        assert len({module.rpartition(".")[2] for module in config["target_modules"]}) == 2
        assert len(config["target_modules"]) == 2 * 3


def test_the_answers_are_those_of_the_exported_adapters(output: Path) -> None:
    content = json.loads((output / "tenants.json").read_text())
    for group in groups(output):
        for folder, prompt, answer in zip(group["folders"], group["prompts"], group["answers"], strict=True):
            base = AutoModelForCausalLM.from_pretrained(content["base_model"], dtype=torch.float32)
            exported, tokens = PeftModel.from_pretrained(base, folder), torch.tensor([prompt])
            is_prompt = torch.ones_like(tokens, dtype=torch.bool)
            for _ in answer:
                known = {"prompt_mask": is_prompt} if group["name"] == serve_vllm.PARA else {}
                following = exported(tokens, **known).logits[:, -1:].argmax(-1)
                tokens = torch.cat((tokens, following), dim=1)
                is_prompt = torch.cat((is_prompt, torch.zeros_like(following, dtype=torch.bool)), dim=1)
            assert tokens[0, len(prompt) :].tolist() == answer


def test_vllm_needs_the_layers_that_its_models_pack(output: Path) -> None:
    by_name = {group["name"]: group["folders"] for group in groups(output)}
    everywhere = serve_vllm.layers_of_vllm(by_name[serve_vllm.EVERYWHERE])
    assert len(everywhere) == 4 * 3  # per layer: Q, K and V; the output; gate and up; down
    assert "model.layers.2.self_attn.qkv_proj" in everywhere
    assert set(serve_vllm.layers_of_vllm(by_name[serve_vllm.BY_LAYER])) < set(everywhere)


def groups(output: Path) -> list[dict[str, list[str]]]:
    return json.loads((output / "tenants.json").read_text())["groups"]
