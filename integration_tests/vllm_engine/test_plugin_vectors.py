"""Compares the vLLM plugin with PARA in transformers. Does not need vLLM: the hooks run in a transformers model."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache

from integration_tests.helpers.models import para, randomize, tiny
from peft_fanlora import ParaConfig
from peft_fanlora.vllm_plugin.layout import EngineLayer, Layout, Part, install
from peft_fanlora.vllm_plugin.loading import load_tenant
from peft_fanlora.vllm_plugin.slots import Slots
from peft_fanlora.vllm_plugin.tenants import TenantError, linear_shapes, prompt_length
from peft_fanlora.vllm_plugin.vectors import Prompt, Row, ScaledLayer, Tenant, Vectors, gather


CPU = torch.device("cpu")


def adapted(seed: int = 1, **config: Any) -> nn.Module:
    """Returns the tiny Llama with a PARA adapter; the base weights are the same in each call."""
    model = get_peft_model(tiny("llama"), ParaConfig(**{"r": 4, "task_type": "CAUSAL_LM", **config}))
    return randomize(model, seed=seed).eval()


class Engine:
    """A transformers model whose linear layers have the plugin's hooks. Each step has one request."""

    def __init__(self, architecture: str = "llama", requests: int = 3) -> None:
        self.model = tiny(architecture)
        shapes = linear_shapes(self.model)
        layers = [
            EngineLayer(ScaledLayer(name, requests + 1), inputs, [Part(name, outputs, 0)], True)
            for name, (inputs, outputs) in shapes.items()
        ]
        self.layout = Layout(layers, shapes)
        self.vectors = Vectors(self.layout.scaled, requests, max_tokens=64)
        install(self.layout, [self.model.get_submodule(name) for name in shapes], self.vectors)
        self.caches: dict[str, DynamicCache] = {}

    def load(self, folder: Path) -> Tenant:
        return load_tenant(folder, self.layout, self.model.config, CPU)

    @torch.no_grad()
    def step(self, request: str, tenant: Tenant | None, tokens: list[int]) -> torch.Tensor:
        is_new = request not in self.caches
        prompt = prompt_length(tokens, tenant.prompt_end) if is_new and tenant is not None else 0
        self.vectors.begin([Row(request, tenant, len(tokens), prompt)])
        cache = self.caches.setdefault(request, DynamicCache())
        logits = self.model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits
        return logits

    def free(self, *requests: str) -> None:
        self.vectors.release(requests)
        for request in requests:
            self.caches.pop(request, None)


@torch.no_grad()
def expected(model: nn.Module, prompt: list[int], answer: list[int]) -> list[torch.Tensor]:
    """Returns the logits of the prompt, and of each following token."""
    cache, steps = DynamicCache(), [prompt, *([token] for token in answer)]
    return [model(torch.tensor([tokens]), past_key_values=cache, use_cache=True).logits for tokens in steps]


def assert_equal(engine: Engine, request: str, tenant: Tenant | None, model: nn.Module, prompt: list[int]) -> None:
    answer = [5, 6, 7]
    for tokens, logits in zip([prompt, *([token] for token in answer)], expected(model, prompt, answer), strict=True):
        torch.testing.assert_close(engine.step(request, tenant, tokens), logits, atol=1e-5, rtol=1e-5)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("llama", {}),
    "mean": ("llama", {"pooling": "mean", "activation": "silu"}),
    "max": ("llama", {"pooling": "max", "activation": "rational", "r": 7}),
    "last": ("llama", {"pooling": "last", "activation": "relu"}),
    "values alone": ("llama", {"target_modules": ["v_proj"]}),
    "up alone": ("llama", {"target_modules": ["up_proj"]}),
    "one block": ("llama", {"layers_to_transform": [1], "target_modules": ["q_proj", "up_proj"]}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "fused projections": ("phi3", {}),
    "sandwich norms": ("gemma2", {}),
    "query and key norms": ("qwen3", {}),
    "learned activation": ("llama", {"activation": "xielu"}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_tables_give_what_transformers_gives(name: str, tmp_path: Path) -> None:
    architecture, config = VARIANTS[name]
    model = para(architecture, **config)
    model.save_pretrained(tmp_path)
    engine = Engine(architecture)
    assert_equal(engine, "a", engine.load(tmp_path), model, [3, 4, 5, 6, 7])
    assert_equal(engine, "base", None, tiny(architecture), [3, 4, 5, 6, 7])


def test_the_prompt_ends_where_the_adapter_says(tmp_path: Path) -> None:
    model = para(prompt_end_token_ids=[8, 9])
    model.save_pretrained(tmp_path)
    engine = Engine()
    tenant = engine.load(tmp_path)
    prompt = [3, 4, 8, 9, 5, 6]
    assert_equal(engine, "a", tenant, model, prompt)
    longer = engine.step("b", tenant, [*prompt, 7])
    torch.testing.assert_close(longer[:, :4], engine.step("c", tenant, prompt[:4]), atol=1e-5, rtol=1e-5)


def test_a_reused_slot_has_no_old_vectors(tmp_path: Path) -> None:
    """Guards against a tenant with fewer targets that reads the other targets' vectors of the previous request."""
    models = {"all": para(), "up alone": adapted(3, target_modules=["up_proj"])}
    engine = Engine(requests=1)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    for name in ("all", "up alone", "all"):
        assert_equal(engine, "r", engine.load(tmp_path / name), models[name], [3, 4, 5])
        engine.free("r")
    assert all(layer.users == 0 for layer in engine.layout.scaled)


def test_requests_keep_their_vectors_while_others_come_and_go(tmp_path: Path) -> None:
    one, other = para(), adapted(2, pooling="mean", target_modules=["v_proj"])
    one.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    engine = Engine()
    first, second = engine.load(tmp_path / "one"), engine.load(tmp_path / "other")
    prompt, others = [3, 4, 5, 6], [9, 8, 7]
    wanted = expected(one, prompt, [5, 6, 7])
    torch.testing.assert_close(engine.step("a", first, prompt), wanted[0], atol=1e-5, rtol=1e-5)
    for token, logits in zip([5, 6, 7], wanted[1:], strict=True):
        assert_equal(engine, "b", second, other, others)
        torch.testing.assert_close(engine.step("a", first, [token]), logits, atol=1e-5, rtol=1e-5)
        engine.free("b")


def test_prompts_of_a_step_are_computed_in_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The generators of eight tenants with prompts of similar length run as one batch."""
    from peft_fanlora.vllm_plugin import vectors as module

    engine = Engine(requests=8)
    tenants = []
    for seed in range(8):
        adapted(seed).save_pretrained(tmp_path / str(seed))
        tenants.append(engine.load(tmp_path / str(seed)))
    calls: list[int] = []
    batched = module.VectorGenerator.batched
    monkeypatch.setattr(
        module.VectorGenerator,
        "batched",
        staticmethod(lambda generators, *args: (calls.append(len(generators)), batched(generators, *args))[1]),
    )
    engine.vectors.begin([Row(str(row), tenant, 4 + row % 3, 4 + row % 3) for row, tenant in enumerate(tenants)])
    hidden = torch.randn(sum(4 + row % 3 for row in range(8)), 16)
    first = tenants[0].blocks[0].first
    engine.vectors.make(first, hidden)
    assert calls == [8]
    start = 0
    for row, tenant in enumerate(tenants):
        length = 4 + row % 3
        block = tenant.blocks[0]
        made = block.generator(hidden[None, start : start + length], torch.ones(1, 1, length, dtype=torch.bool))
        for target, (layer, begin) in block.targets.items():
            own = layer.table[engine.vectors.slots.of(str(row))]
            vector = made[target][0, 0]
            torch.testing.assert_close(own[begin - layer.start :][: len(vector)], vector)
        start += length


def test_a_long_prompt_does_not_pad_the_short_ones() -> None:
    engine = Engine()
    lengths = [30, 3, 3]
    layer = engine.layout.scaled[0]
    generator = para().get_base_model().model.layers[0].self_attn.q_proj.para_generator["default"]
    from peft_fanlora.vllm_plugin.vectors import Block

    tenant = Tenant([Block(layer, generator, {})])
    engine.vectors.begin([Row(str(row), tenant, length, length) for row, length in enumerate(lengths)])
    ((_, stacks),) = engine.vectors._stacks.items()
    assert sorted(len(prompts) for prompts, _ in stacks) == [1, 2]


@pytest.mark.parametrize("starts", [[0, 4], [0, 5], [2, 9]])
@pytest.mark.parametrize("lengths", [[4, 4], [4, 3]])
def test_prompts_are_gathered_from_the_tokens_of_a_step(starts: list[int], lengths: list[int]) -> None:
    tokens = torch.randn(14, 2)
    hidden, mask = gather(tokens, [Prompt(1, start, length) for start, length in zip(starts, lengths, strict=True)])
    for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        assert mask[row, 0].sum() == length
        assert torch.equal(hidden[row, :length], tokens[start : start + length])


def test_a_prompt_in_pieces_is_an_error(tmp_path: Path) -> None:
    para().save_pretrained(tmp_path)
    engine = Engine()
    with pytest.raises(RuntimeError, match="3 of the 5 prompt tokens of 'a'"):
        engine.vectors.begin([Row("a", engine.load(tmp_path), 3, 5)])


def test_a_request_without_vectors_is_an_error(tmp_path: Path) -> None:
    para().save_pretrained(tmp_path)
    engine = Engine()
    with pytest.raises(RuntimeError, match="'a' has no vectors"):
        engine.vectors.begin([Row("a", engine.load(tmp_path), 1)])


def test_slots_are_handed_out_and_come_back() -> None:
    slots = Slots(2)
    assert {slots.take("a"), slots.take("b")} == {1, 2}
    assert slots.take("a") == slots.of("a")
    with pytest.raises(RuntimeError, match="'c'"):
        slots.take("c")
    freed = slots.of("a")
    assert slots.release("a") == freed
    assert slots.release("a") is None
    assert slots.take("c") == freed
    assert len(slots) == 2
    with pytest.raises(RuntimeError, match="'a'"):
        slots.of("a")


def split(layer: int, rank: int, ranks: int) -> list[EngineLayer]:
    """Returns the packed layers of a block on a tensor-parallel rank; key and value heads may be replicated."""
    prefix = f"model.layers.{layer}."
    query, up = 16 // ranks, 24 // ranks
    parts = [
        [
            Part(f"{prefix}self_attn.q_proj", query, rank * query),
            Part(f"{prefix}self_attn.k_proj", 4, rank * 2 // ranks * 4),
            Part(f"{prefix}self_attn.v_proj", 4, rank * 2 // ranks * 4),
        ],
        [Part(f"{prefix}mlp.gate_proj", up, rank * up), Part(f"{prefix}mlp.up_proj", up, rank * up)],
    ]
    names = ("self_attn.qkv_proj", "mlp.gate_up_proj")
    return [EngineLayer(ScaledLayer(prefix + name, 4), 16, own, True) for name, own in zip(names, parts, strict=True)]


@pytest.mark.parametrize("targets", [None, ["v_proj", "up_proj"], ["q_proj"], ["gate_proj", "k_proj"]])
def test_ranks_hold_the_vectors_of_their_own_outputs(targets: list[str] | None, tmp_path: Path) -> None:
    model = para(target_modules=targets)
    model.save_pretrained(tmp_path)
    base = tiny("llama")
    shapes = linear_shapes(base)
    whole = Engine()
    tenant = whole.load(tmp_path)
    hidden = torch.randn(6, 16)
    whole.vectors.begin([Row("a", tenant, 6, 6)])
    for block in tenant.blocks:
        whole.vectors.make(block.first, hidden)
    tables = {layer.name: layer for layer in whole.layout.scaled}
    for rank in range(4):
        layers = [layer for index in range(3) for layer in split(index, rank, 4)]
        vectors = Vectors([layer.scaled for layer in layers], 3, 64)
        shared = load_tenant(tmp_path, Layout(layers, shapes), base.config, CPU)
        vectors.begin([Row("a", shared, 6, 6)])
        for block in shared.blocks:
            vectors.make(block.first, hidden)
        for layer in layers:
            width = sum(part.size for part in layer.parts)
            outputs = torch.ones(6, width)
            vectors.scale_(layer.scaled, outputs)
            wanted = torch.cat([_own(tables[part.module], part) for part in layer.parts])
            torch.testing.assert_close(outputs[0], wanted)


def _own(whole: ScaledLayer, part: Part) -> torch.Tensor:
    if not whole.table.shape[1]:
        return torch.ones(part.size)
    return whole.table[1, part.start : part.start + part.size]


def test_an_adapter_that_begins_where_ranks_share_the_input_is_refused(tmp_path: Path) -> None:
    para(target_modules=["o_proj"]).save_pretrained(tmp_path)
    engine = Engine()
    layers = [EngineLayer(layer.scaled, layer.num_inputs, layer.parts, False) for layer in engine.layout.layers]
    with pytest.raises(TenantError, match="tensor_parallel_size=1"):
        load_tenant(tmp_path, Layout(layers, engine.layout.shapes), engine.model.config, CPU)
