"""The costs of LoRA modules in vLLM; `make test-vllm` runs this."""

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from integration_tests.vllm_engine.para_engines import make_base
from peft_fanlora import module_costs
from peft_fanlora.fanlora import cost_measurement


pytestmark = pytest.mark.vllm


def test_costs_of_packed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engines = []
    start = cost_measurement._engine
    monkeypatch.setattr(
        cost_measurement, "_engine", lambda *args, **kwargs: engines.append(start(*args, **kwargs)) or engines[-1]
    )
    model = AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "base"))
    costs = module_costs(model, "vllm", r=4, tenants=2, rounds=4)
    assert len(costs.parameters) == 21
    assert [modules for modules, *_ in costs.measured] == [21, 14, 3, 3, 6, 9]
    assert costs.conditions["base_ms"] > 0

    def adapted(engine: object) -> list[str]:
        from vllm.lora.layers import BaseLayerWithLoRA

        (names,) = engine.apply_model(  # type: ignore[attr-defined]
            lambda model: [name for name, part in model.named_modules() if isinstance(part, BaseLayerWithLoRA)]
        )
        return names

    assert [len(adapted(engine)) for engine in engines] == [0, 12, 8, 3, 3, 3, 3]
