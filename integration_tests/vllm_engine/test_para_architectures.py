"""PARA in vLLM on further architectures: all tokens equal those of transformers. Run by `make test-vllm`."""

from pathlib import Path
from typing import Any

import pytest

from integration_tests.vllm_engine.para_engines import answers, count_misses, make_base, make_jobs, make_tenants, start


pytestmark = pytest.mark.vllm

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Mistral": ("MistralConfig", {"sliding_window": None}),
    "Qwen2": ("Qwen2Config", {}),
    "Qwen3": ("Qwen3Config", {}),
    "Gemma 2": ("Gemma2Config", {"query_pre_attn_scalar": 32, "tie_word_embeddings": True}),
    "Gemma 3": (
        "Gemma3TextConfig",
        {"query_pre_attn_scalar": 32, "sliding_window": 16, "num_hidden_layers": 6, "tie_word_embeddings": True},
    ),
    "Granite": ("GraniteConfig", {}),
    "Phi-3": ("Phi3Config", {"original_max_position_embeddings": 256}),
    "GLM": ("GlmConfig", {}),
    "GLM-4": ("Glm4Config", {}),
    "OLMo 2": ("Olmo2Config", {}),
}
"""Architecture -> config class and values. vLLM runs OLMo 2 with its Transformers backend."""

FUSED_UP = {"Phi-3", "GLM", "GLM-4"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_tenants_of_an_architecture(name: str, tmp_path: Path) -> None:
    config_class, overrides = ARCHITECTURES[name]
    base = make_base(tmp_path / "base", config_class, **overrides)
    up = ["gate_up_proj"] if name in FUSED_UP else ["up_proj"]
    configs = {"plain": {}, "mean": {"pooling": "mean", "activation": "silu"}, "up": {"target_modules": up}}
    tenants = make_tenants(base, tmp_path / "tenants", configs)
    jobs = make_jobs(tenants, 20, new_tokens=10, seed=2)
    assert count_misses(answers(start(base), tenants, jobs), jobs) == 0
