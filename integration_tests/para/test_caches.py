"""What a cache does to itself, the vectors on it follow; what they cannot follow is refused."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, QuantizedCache, StaticCache
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, DynamicLayer, Fp8QuantizedLayer

from integration_tests.helpers.models import (
    ENCODER_DECODER,
    IDS,
    LLAMA,
    generate,
    leading,
    para,
    randomize,
    tiny,
    tokens,
)
from peft_fanlora import ParaConfig
from peft_fanlora.para.caches import holds_tokens
from peft_fanlora.serving.call import cache_in


PROMPT = 6
SMALL = {**LLAMA, "num_hidden_layers": 2}
STATES = {**IDS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8}
MINIMAX = {**SMALL, "num_local_experts": 2, "num_experts_per_tok": 1}
HYBRID = {
    **LLAMA,
    "num_hidden_layers": 4,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
}
LINEAR, FULL = "linear_attention", "full_attention"

# The configuration, and the targets: the projection into a block's mixer, or query and value, and one more.
STATEFUL: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "mamba": (lambda: tf.MambaConfig(**STATES), ["in_proj", "x_proj"]),
    "mamba2": (lambda: tf.Mamba2Config(**STATES, num_heads=4, head_dim=8, n_groups=1), ["in_proj"]),
    "falcon_mamba": (lambda: tf.FalconMambaConfig(**STATES), ["in_proj", "x_proj"]),
    "rwkv": (lambda: tf.RwkvConfig(**IDS, hidden_size=16, num_hidden_layers=2), ["receptance", "value"]),
    "minimax": (lambda: tf.MiniMaxConfig(**MINIMAX, layer_types=[LINEAR, FULL]), ["qkv_proj", "q_proj", "v_proj"]),
    "minimax_linear": (lambda: tf.MiniMaxConfig(**MINIMAX, layer_types=[LINEAR] * 2), ["qkv_proj", "out_proj"]),
    "bamba": (lambda: tf.BambaConfig(**HYBRID, attn_layer_indices=[1, 3]), ["in_proj", "q_proj", "v_proj", "up_proj"]),
    "lfm2": (lambda: tf.Lfm2Config(**SMALL, layer_types=["conv", FULL]), ["in_proj", "q_proj", "v_proj", "w3"]),
    "zamba": (
        lambda: tf.ZambaConfig(
            **{**LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4},
            layer_types=["mamba", "hybrid", "mamba", "hybrid"],
            attention_head_dim=8,
            mamba_d_state=8,
            n_mamba_heads=2,
            mamba_dt_rank=4,
        ),
        ["in_proj", "q_proj", "v_proj", "up_proj"],
    ),
}


def stateful(name: str) -> nn.Module:
    """Returns an adapted model that keeps states rather than keys, in some of its layers or in all."""
    config, targets = STATEFUL[name]
    torch.manual_seed(0)
    base = tf.AutoModelForCausalLM.from_config(config()).float()
    for parameter in base.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return randomize(get_peft_model(base, ParaConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))).eval()


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def forced(model: nn.Module, whole: torch.Tensor, prompt: int = PROMPT, **kwargs: Any) -> torch.Tensor:
    """Returns the logits of one pass over whole sequences."""
    return model(whole, prompt_mask=leading(whole, prompt), **kwargs).logits


def filled(model: nn.Module, rows: int = 2, cache: Any = None, seed: int = 0) -> tuple[torch.Tensor, Any]:
    """Returns a prompt, and a cache that holds it."""
    prompt = tokens(rows, PROMPT, seed)
    return prompt, model(prompt, past_key_values=cache, use_cache=True).past_key_values


def through_pickle(cache: Any) -> Any:
    return pickle.load(io.BytesIO(pickle.dumps(cache)))


class TestEveryKindOfCache:
    @pytest.mark.parametrize("name", sorted(STATEFUL))
    @torch.no_grad()
    def test_a_loop_equals_one_pass_where_layers_keep_states(self, name: str) -> None:
        """Guards against each token being taken for a prompt, where a cache says nothing of its length: off by 4."""
        model = stateful(name)
        rows = 1 if name == "rwkv" else 2  # transformers mixes the rows of RWKV's states
        whole = tokens(rows, PROMPT + 4)
        out = model(whole[:, :PROMPT], use_cache=True)
        logits = [out.logits[:, -1:]]
        knows_positions = "position_ids" in inspect.signature(model.get_base_model().forward).parameters
        for step in range(PROMPT, PROMPT + 4):
            cache = next(key for key in ("cache", "past_key_values", "cache_params", "state") if key in out)
            given = {"position_ids": torch.full((rows, 1), step)} if knows_positions else {}
            out = model(input_ids=whole[:, step : step + 1], use_cache=True, **{cache: out[cache]}, **given)
            logits.append(out.logits)
        close(torch.cat(logits, 1), forced(model, whole)[:, PROMPT - 1 :])
        with model.disable_adapter():
            assert (model(whole).logits[:, PROMPT:] - torch.cat(logits[1:], 1)).abs().max() > 1e-2

    @pytest.mark.parametrize("name", ["mamba", "mamba2", "falcon_mamba", "lfm2"])
    @torch.no_grad()
    def test_generation_where_layers_keep_states(self, name: str) -> None:
        """Guards against the same in `generate`, of padded rows too: the first decoded token is under `cache_params`."""
        model = stateful(name)
        prompt = tokens()
        mask = torch.ones_like(prompt)
        mask[0, :3] = 0
        generated = generate(model, prompt, attention_mask=mask)
        whole = torch.cat((mask, mask.new_ones(2, 6)), 1)
        expected = forced(model, generated.sequences, 7, attention_mask=whole)[:, 6:-1]
        close(torch.stack(generated.logits, 1), expected)

    @pytest.mark.parametrize("name", ["mamba", "minimax_linear", "rwkv"])
    @torch.no_grad()
    def test_states_of_the_base_model_are_refused(self, name: str) -> None:
        model = stateful(name)
        with model.disable_adapter():
            out = model(tokens(1), use_cache=True)
        cache = next(key for key in ("past_key_values", "cache_params", "state") if key in out)
        with pytest.raises(ValueError, match="with its PARA adapter active"):
            model(input_ids=tokens(1, 1), **{cache: out[cache]})

    @torch.no_grad()
    def test_a_reset_state_takes_a_new_prompt(self) -> None:
        model = stateful("mamba")
        cache = model(tokens(), use_cache=True).cache_params
        cache.reset()
        whole = tokens(2, 8, seed=4)
        model(whole[:, :PROMPT], cache_params=cache)
        close(model(whole[:, PROMPT : PROMPT + 1], cache_params=cache).logits, forced(model, whole)[:, PROMPT:7])

    @pytest.mark.parametrize("kind", ["lazy", "dynamic", "static", "fp8", "sliding"])
    @torch.no_grad()
    def test_each_class_of_caches(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Fp8QuantizedLayer, "fp8_dtype", torch.float32)  # keeps what it quantises exact
        model = para("gemma3_text" if kind == "sliding" else "llama")
        config = model.config
        cache = {
            "lazy": DynamicCache,
            "dynamic": lambda: DynamicCache(config=config),
            "static": lambda: StaticCache(config=config, max_cache_len=32),
            "fp8": lambda: QuantizedCache("fp8", config),
            "sliding": lambda: StaticCache(config=config, max_cache_len=32),
        }[kind]()
        whole = tokens(2, 16)
        model(whole[:, :PROMPT], past_key_values=cache)
        steps = [model(whole[:, i : i + 1], past_key_values=cache).logits for i in range(PROMPT, 16)]
        close(torch.cat(steps, 1), forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_as_many_new_tokens_as_rows(self) -> None:
        """Guards against a second turn that is refused because its shape does not say which dimension holds the rows."""
        model = para()
        whole = tokens(2, PROMPT + 2)
        cache = model(whole[:, :PROMPT], use_cache=True).past_key_values
        found = model(whole[:, PROMPT:], past_key_values=cache, prompt_mask=torch.zeros(2, 2, dtype=torch.bool)).logits
        close(found, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_a_static_cache_that_is_allocated_early_is_empty(self) -> None:
        model = para()
        cache = StaticCache(config=model.config, max_cache_len=32)
        cache.early_initialization(2, 2, 4, torch.float32, torch.device("cpu"))
        assert not holds_tokens(cache)
        whole = tokens(2, PROMPT + 1)
        model(whole[:, :PROMPT], past_key_values=cache)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_a_decoder_with_cross_attention_counts_its_own_tokens(self) -> None:
        """Guards against the length of the encoder's output being taken for the cached tokens."""
        torch.manual_seed(0)
        base = tf.BartForCausalLM(tf.BartConfig(**ENCODER_DECODER, is_decoder=True, is_encoder_decoder=False))
        model = randomize(
            get_peft_model(base, ParaConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"]))
        )
        model.eval()
        memory, whole = torch.randn(2, 3, 16), tokens(2, PROMPT + 3)
        cache = model(whole[:, :PROMPT], encoder_hidden_states=memory, use_cache=True).past_key_values
        steps = [
            model(whole[:, i : i + 1], encoder_hidden_states=memory, past_key_values=cache).logits
            for i in range(PROMPT, PROMPT + 3)
        ]
        close(torch.cat(steps, 1), forced(model, whole, encoder_hidden_states=memory)[:, PROMPT:])
        cache.crop(-PROMPT)
        with pytest.raises(ValueError, match="cropped to 3 tokens"):
            model(tokens(2, 1, seed=9), encoder_hidden_states=memory, past_key_values=cache)

    def test_a_state_that_is_no_cache(self) -> None:
        assert cache_in({"state": torch.zeros(2, 3), "past_key_values": None}) is None


class TestRows:
    """Guards against vectors that stay in the order of the prompts while the rows of the cache move."""

    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
    @pytest.mark.parametrize(
        "copied", [lambda cache: cache, copy.deepcopy, through_pickle], ids=["same", "copy", "pickle"]
    )
    @torch.no_grad()
    def test_reordered(self, kind: type, copied: Callable[[Any], Any]) -> None:
        model = para()
        sizes = {"max_cache_len": 32} if kind is StaticCache else {}
        prompt, cache = filled(model, 3, kind(config=model.config, **sizes))
        cache, order = copied(cache), torch.tensor([2, 0, 0])
        cache.reorder_cache(order)
        cache.reorder_cache(torch.tensor([0, 2, 1]))
        whole = torch.cat((prompt[order][[0, 2, 1]], tokens(3, 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @pytest.mark.parametrize(
        "indices", [torch.tensor([2, 0]), torch.tensor([True, False, True]), [1], slice(1, 3)], ids=str
    )
    @torch.no_grad()
    def test_selected(self, indices: Any) -> None:
        model = para()
        prompt, cache = filled(model, 3)
        cache.batch_select_indices(indices)
        rows = prompt[indices]
        whole = torch.cat((rows, tokens(len(rows), 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_repeated(self) -> None:
        model = para()
        prompt, cache = filled(model)
        cache.batch_repeat_interleave(2)
        whole = torch.cat((prompt.repeat_interleave(2, 0), tokens(4, 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_of_the_layers_one_by_one(self) -> None:
        model = para()
        prompt, cache = filled(model)
        for layer in cache.layers:
            layer.reorder_cache(torch.tensor([1, 0]))
        whole = torch.cat((prompt.flip(0), tokens(2, 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_of_states(self) -> None:
        model = stateful("mamba")
        prompt = tokens(2, PROMPT)
        cache = model(prompt, use_cache=True).cache_params
        cache.reorder_cache(torch.tensor([1, 0]))
        whole = torch.cat((prompt.flip(0), tokens(2, 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], cache_params=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_of_several_adapters(self) -> None:
        """The adapter of a row moves with it, and another order of names is refused."""
        model = para()
        model.add_adapter("second", ParaConfig(r=3, task_type="CAUSAL_LM"))
        randomize(model, "second", seed=7).eval()
        prompt, names = tokens(3, PROMPT), ["second", "default", "__base__"]
        cache = model(prompt, adapter_names=names, use_cache=True).past_key_values
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.batch_select_indices(torch.tensor([0, 2]))
        whole = torch.cat((prompt[[1, 0]], tokens(2, 1, seed=5)), 1)
        expected = forced(model, whole, adapter_names=["default", "second"])[:, PROMPT:]
        with pytest.raises(ValueError, match="filled with the adapters"):
            model(whole[:, PROMPT:], past_key_values=cache, adapter_names=["second", "default"])
        close(model(whole[:, PROMPT:], past_key_values=cache, adapter_names=["default", "second"]).logits, expected)

    @torch.no_grad()
    def test_of_the_base_model_in_a_mixed_batch(self) -> None:
        """Guards against rows that are counted by vectors which the base model's rows don't have."""
        model = para()
        prompt = tokens(2, PROMPT)
        cache = model(prompt, adapter_names=["__base__"] * 2, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        whole = torch.cat((prompt.flip(0), tokens(2, 1, seed=5)), 1)
        found = model(whole[:, PROMPT:], past_key_values=cache, adapter_names=["__base__"] * 2).logits
        with model.disable_adapter():
            close(found, model(whole).logits[:, PROMPT:])

    @torch.no_grad()
    def test_of_an_encoder_and_a_decoder(self) -> None:
        model = para("t5", task_type="SEQ_2_SEQ_LM")
        prompt, decoded = tokens(2, PROMPT), tokens(2, 3, seed=4)
        out = model(input_ids=prompt, decoder_input_ids=decoded[:, :2], use_cache=True)
        cache = copy.deepcopy(out.past_key_values)
        assert isinstance(cache, EncoderDecoderCache)
        order = torch.tensor([1, 0])
        cache.reorder_cache(order)
        memory = (out.encoder_last_hidden_state[order],)
        found = model(encoder_outputs=memory, decoder_input_ids=decoded[order][:, 2:], past_key_values=cache).logits
        expected = model(input_ids=prompt[order], decoder_input_ids=decoded[order]).logits
        close(found, expected[:, 2:])
        cache.crop(-3)  # the prompt is the encoder's, and stays
        found = model(encoder_outputs=memory, decoder_input_ids=decoded[order], past_key_values=cache).logits
        close(found, expected)
        cache.reset()
        model(input_ids=decoded, decoder_input_ids=decoded[:, :2], past_key_values=cache)
        found = model(input_ids=decoded, decoder_input_ids=decoded[:, 2:], past_key_values=cache).logits
        close(found, model(input_ids=decoded, decoder_input_ids=decoded).logits[:, 2:])


class TestCropped:
    @torch.no_grad()
    def test_into_the_prompt_and_refilled_with_another(self) -> None:
        """Guards against the vectors of the old prompt being read for the new one, up to the old length."""
        model = para()
        prompt, cache = filled(model)
        other = torch.cat((prompt[:, :3], tokens(2, PROMPT - 3, seed=9)), 1)
        cache.crop(-3)
        with pytest.raises(ValueError, match="cropped to 3 tokens, which is within the prompt of 6"):
            generate(model, other, past_key_values=cache)
        with pytest.raises(ValueError, match="cropped to 3 tokens"):
            model(other[:, 3:4], past_key_values=cache)

    @pytest.mark.parametrize("cropped", [1, 3, 6])
    @torch.no_grad()
    def test_into_the_prompt_and_refilled_with_the_same(self, cropped: int) -> None:
        model = para()
        prompt, cache = filled(model)
        expected = generate(model, prompt)
        cache.crop(-cropped)
        found = generate(model, prompt, past_key_values=cache)
        assert found.sequences.tolist() == expected.sequences.tolist()
        close(torch.stack(found.logits, 1), torch.stack(expected.logits, 1))

    @torch.no_grad()
    def test_and_refilled_token_by_token(self) -> None:
        model = para()
        prompt, cache = filled(model)
        cache.crop(-2)
        cache.reorder_cache(torch.tensor([1, 0]))
        whole = torch.cat((prompt.flip(0), tokens(2, 2, seed=3)), 1)
        steps = [model(whole[:, i : i + 1], past_key_values=cache).logits for i in range(4, 8)]
        close(torch.cat(steps, 1), forced(model, whole)[:, 4:])

    @torch.no_grad()
    def test_behind_the_prompt(self) -> None:
        model = para()
        prompt, cache = filled(model)
        for i in range(3):
            model(tokens(2, 1, seed=i), past_key_values=cache)
        cache.crop(-3)
        whole = torch.cat((prompt, tokens(2, 1, seed=5)), 1)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])

    @torch.no_grad()
    def test_to_nothing(self) -> None:
        model = para()
        _, cache = filled(model)
        cache.crop(-PROMPT)
        whole = tokens(2, PROMPT + 1, seed=8)
        model(whole[:, :PROMPT], past_key_values=cache)
        close(model(whole[:, PROMPT:], past_key_values=cache).logits, forced(model, whole)[:, PROMPT:])


class TestFilledByOthers:
    """Guards against vectors that are read for what something else wrote into the cache."""

    @pytest.mark.parametrize("kind", [DynamicCache, StaticCache], ids=["dynamic", "static"])
    @pytest.mark.parametrize("reset", [True, False])
    @pytest.mark.parametrize("other", ["disabled", "base", "para", "failed"])
    @torch.no_grad()
    def test_after_a_call_of_another(self, kind: type, reset: bool, other: str) -> None:
        model = para()
        sizes = {"max_cache_len": 32} if kind is StaticCache else {}
        _, cache = filled(model, cache=kind(config=model.config, **sizes))
        if reset:
            cache.reset()
        text = tokens(2, PROMPT if reset else 1, seed=4)
        if other == "disabled":
            with model.disable_adapter():
                model(text, past_key_values=cache)
        elif other == "failed":
            head = model.get_base_model().lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(text, past_key_values=cache)
            head.remove()
        elif other == "base" or reset:
            (tiny("llama") if other == "base" else para(seed=3))(text, past_key_values=cache)
        else:
            with pytest.raises(ValueError, match="not filled by this model"):
                para(seed=3)(text, past_key_values=cache)
            return
        with pytest.raises(ValueError, match="not filled by this model"):
            model(tokens(2, 1, seed=5), past_key_values=cache)

    @torch.no_grad()
    def test_with_layers_of_another_cache(self) -> None:
        model = para()
        (_, cache), (_, other) = filled(model), filled(model, seed=3)
        cache.layers = other.layers
        with pytest.raises(ValueError, match="not filled by this model"):
            model(tokens(2, 1), past_key_values=cache)

    @torch.no_grad()
    def test_a_shallow_copy_that_shares_its_layers(self) -> None:
        model = para()
        _, cache = filled(model)
        shared = copy.copy(cache)
        shared.reset()
        filled(model, cache=shared, seed=3)
        with pytest.raises(ValueError, match="not filled by this model"):
            model(tokens(2, 1), past_key_values=cache)

    @torch.no_grad()
    def test_other_caches_and_classes_are_left_alone(self) -> None:
        """Guards against a class of layers that transformers would enter in its tables."""
        before = dict(DYNAMIC_LAYER_TYPE_MAPPING)
        _, cache = filled(para())
        assert before == DYNAMIC_LAYER_TYPE_MAPPING and isinstance(cache.layers[0], DynamicLayer)
        assert repr(cache) == "DynamicCache(layers=[DynamicLayer, DynamicLayer, DynamicLayer])"
        assert type(DynamicCache(config=para().config).layers[0]) is DynamicLayer
