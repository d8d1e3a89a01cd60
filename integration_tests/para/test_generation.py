"""The vectors live with the KV cache: whatever way the tokens come, one teacher-forced pass gives the same logits."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from peft import get_peft_model
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    StaticCache,
    TextIteratorStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

from integration_tests.helpers.models import CAUSAL, GREEDY, VOCAB, generate, leading, para, randomize, tiny, tokens
from peft_fanlora import ParaConfig
from peft_fanlora.para.core.generator import POOLINGS


def teacher_forced(model, sequences, prompt_length, since=None, **kwargs):
    """Logits of the tokens after the prompt, or since another one, in one pass over the whole sequences."""
    logits = model(sequences, prompt_mask=leading(sequences, prompt_length), **kwargs).logits
    return logits[:, (since or prompt_length) - 1 : -1]


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.support("generation")
@pytest.mark.parametrize("name", sorted(CAUSAL))
@torch.no_grad()
def test_cached_generation_equals_one_teacher_forced_pass(name):
    model = para(name)
    prompt = tokens()
    generated = generate(model, prompt)
    close(torch.stack(generated.logits, 1), teacher_forced(model, generated.sequences, prompt.shape[1]))
    with model.disable_adapter():
        base = model(generated.sequences).logits[:, prompt.shape[1] - 1 : -1]
    assert (base - torch.stack(generated.logits, 1)).abs().max() > 1e-3, "the adapter does nothing"


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(pooling, side):
    """Guards against pooling over padding, which changes the vectors with the longest prompt of the batch."""
    model = para(pooling=pooling)
    short, long = tokens(1, 5, seed=3), tokens(1, 9, seed=4)
    padding = torch.zeros(1, 4, dtype=torch.long)
    padded = torch.cat((padding, short) if side == "left" else (short, padding), 1)
    batch = torch.cat((padded, long))
    mask = torch.ones_like(batch)
    mask[0] = torch.cat((padding, torch.ones_like(short)) if side == "left" else (torch.ones_like(short), padding), 1)
    logits = model(batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    close(logits[:1][mask[:1].bool()], model(short).logits[0])
    close(logits[1:], model(long).logits)
    if side == "left":
        alone = generate(model, short)
        together = generate(model, batch, attention_mask=mask)
        close(torch.stack(together.logits, 1)[:1], torch.stack(alone.logits, 1))


@pytest.mark.support("static cache, no cache, prompt lookup")
@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_cache": False},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "dynamic"},
    ],
    ids=["no cache", "static cache", "prompt lookup", "dynamic cache"],
)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_every_way_to_decode_gives_the_same_tokens(name, kwargs):
    """Guards against drafts being pooled, and against a prompt that grows with the answer where no cache is used."""
    model = para(name)
    prompt = tokens(1, 8).repeat(1, 2)
    expected = generate(model, prompt, new=8)
    actual = generate(model, prompt, new=8, **kwargs)
    assert actual.sequences.tolist() == expected.sequences.tolist()
    close(torch.stack(actual.logits, 1), torch.stack(expected.logits, 1))


@pytest.mark.support("assisted decoding")
@torch.no_grad()
def test_assisted_decoding_with_another_model():
    model, assistant = para(), para(seed=5)
    prompt = tokens(1, 8)
    expected = generate(model, prompt, new=10)
    assert generate(model, prompt, new=10, assistant_model=assistant.get_base_model()).sequences.tolist() == (
        expected.sequences.tolist()
    )


@pytest.mark.support("beam search")
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_beam_search_rescored(use_cache):
    """The score that beam search reports is that of a teacher-forced pass."""
    model = para()
    prompt = tokens(2, 6)
    found = generate(
        model,
        prompt,
        new=5,
        num_beams=3,
        num_return_sequences=2,
        output_scores=True,
        length_penalty=0.0,
        use_cache=use_cache,
    )
    logits = teacher_forced(model, found.sequences, 6).log_softmax(-1)
    rescored = logits.gather(-1, found.sequences[:, 6:, None]).sum((1, 2))
    torch.testing.assert_close(rescored, found.sequences_scores, atol=1e-4, rtol=1e-4)


@pytest.mark.support("sampling")
@torch.no_grad()
def test_several_samples_of_each_prompt():
    model = para()
    prompt = tokens(2, 6)
    torch.manual_seed(0)
    sampled = generate(model, prompt, do_sample=True, num_return_sequences=3)
    close(torch.stack(sampled.logits, 1), teacher_forced(model, sampled.sequences, 6))


@torch.no_grad()
def test_generation_with_prompt_mask():
    """The caller's prompt_mask decides in `generate` as it does in a forward pass."""
    model = para()
    prompt = tokens(2, 8)
    generated = generate(model, prompt, prompt_mask=leading(prompt, 3))
    close(
        torch.stack(generated.logits, 1),
        model(generated.sequences, prompt_mask=leading(generated.sequences, 3)).logits[:, 7:-1],
    )


@pytest.mark.support("generation from `inputs_embeds`")
@torch.no_grad()
def test_generation_from_embeddings():
    model = para()
    prompt = tokens(2, 6)
    embeds = model.get_input_embeddings()(prompt)
    expected = generate(model, prompt)
    actual = model.generate(
        inputs_embeds=embeds,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
    )
    assert actual.tolist() == expected.sequences[:, 6:].tolist()


@pytest.mark.support("streaming")
@torch.no_grad()
def test_streaming():
    class Decoder:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids)) + " "

    model = para()
    prompt = tokens(1, 6)
    streamer = TextIteratorStreamer(Decoder(), skip_prompt=True)
    thread = threading.Thread(
        target=lambda: model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            streamer=streamer,
        )
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert [int(word) for word in text.split()] == generate(model, prompt).sequences[0, 6:].tolist()


@torch.no_grad()
def test_a_second_turn_keeps_the_vectors_of_the_first_prompt():
    model = para()
    first, question = tokens(1, 6), tokens(1, 4, seed=9)
    cache = DynamicCache(config=model.config)
    answer = generate(model, first, past_key_values=cache).sequences
    second = torch.cat((answer, question), 1)
    generated = generate(model, second, past_key_values=cache)
    expected = model(generated.sequences, prompt_mask=leading(generated.sequences, 6)).logits[
        :, second.shape[1] - 1 : -1
    ]
    close(torch.stack(generated.logits, 1), expected)


@pytest.mark.parametrize("kind", ["one token", "end of text"])
@pytest.mark.parametrize("given", ["whole text", "new tokens"])
@pytest.mark.parametrize("rows", [1, 2])
@torch.no_grad()
def test_a_second_turn_after_an_answer_of_one_token(rows, given, kind):
    """The answer is not in the cache yet, so that it comes with the question, as more of a prompt would."""
    model = para()
    first, question = tokens(rows, 6), tokens(rows, 4, seed=9)
    cache = DynamicCache(config=model.config)
    answer = generate(model, first, new=1).sequences
    end = (
        {"max_new_tokens": 1} if kind == "one token" else {"max_new_tokens": 9, "eos_token_id": answer[:, -1].tolist()}
    )
    model.generate(first, attention_mask=torch.ones_like(first), past_key_values=cache, **GREEDY, **end)
    assert cache.get_seq_length() == 6
    second = torch.cat((answer, question), 1)
    mask = torch.ones_like(second)
    expected = generate(model, second, prompt_mask=leading(second, 6))
    ids = second if given == "whole text" else second[:, 6:]
    generated = generate(model, ids, past_key_values=cache, attention_mask=mask)
    close(torch.stack(generated.logits, 1), torch.stack(expected.logits, 1))
    assert torch.equal(generated.sequences[:, -6:], expected.sequences[:, -6:])


@torch.no_grad()
def test_a_second_turn_on_the_cache_that_generate_returns():
    model = para()
    first, question = tokens(2, 6), tokens(2, 4, seed=9)
    answered = generate(model, first, new=1, do_sample=True, num_return_sequences=2)
    second = torch.cat((answered.sequences, question.repeat_interleave(2, 0)), 1)
    logits = model(second[:, 6:], past_key_values=answered.past_key_values).logits
    close(logits, model(second, prompt_mask=leading(second, 6)).logits[:, 6:])


@torch.no_grad()
def test_prompt_mask_tells_generate_that_a_second_turn_has_no_prompt():
    """Guards against an error whose advice cannot be followed: here nothing tells an answer from more prompt."""
    model = para()
    first = tokens(2, 6)
    second = torch.cat((first, tokens(2, 5, seed=9)), 1)
    expected = torch.stack(generate(model, second, prompt_mask=leading(second, 6)).logits, 1)
    for says in (torch.zeros_like(second, dtype=torch.bool), leading(second, 6)):
        cache = model(first, use_cache=True).past_key_values
        generated = generate(model, second, past_key_values=cache, prompt_mask=says)
        close(torch.stack(generated.logits, 1), expected)
    cache = model(first, use_cache=True).past_key_values
    new = {"attention_mask": torch.ones_like(second), "prompt_mask": torch.zeros(2, 5, dtype=torch.bool)}
    close(torch.stack(generate(model, second[:, 6:], past_key_values=cache, **new).logits, 1), expected)


@torch.no_grad()
def test_a_copied_cache_has_vectors_of_its_own():
    """Guards against vectors that are looked up by the identity of the cache, which a copy does not share."""
    model = para()
    prompt, rest = tokens(2, 6), tokens(2, 3, seed=8)
    whole = torch.cat((prompt, rest), 1)
    cache = model(prompt, use_cache=True).past_key_values
    copied = copy.deepcopy(cache)
    model(tokens(2, 5, seed=7), use_cache=True)
    expected = model(whole, prompt_mask=leading(whole, 6)).logits
    for each in (cache, copied):
        steps = [model(rest[:, i : i + 1], past_key_values=each).logits for i in range(3)]
        close(torch.cat(steps, 1), expected[:, 6:])


@torch.no_grad()
def test_interleaved_generations_do_not_mix():
    """Guards against one set of vectors per model: the last prefill would serve every running generation."""
    model = para()
    prompts = [tokens(1, 5, seed=1), tokens(2, 8, seed=2)]
    wholes = [torch.cat((p, tokens(p.shape[0], 4, seed=3)), 1) for p in prompts]
    caches = [model(p, use_cache=True).past_key_values for p in prompts]
    steps = [[], []]
    for i in range(4):
        for which, (prompt, whole) in enumerate(zip(prompts, wholes, strict=True)):
            at = prompt.shape[1] + i
            steps[which].append(model(whole[:, at : at + 1], past_key_values=caches[which]).logits)
    for prompt, whole, logits in zip(prompts, wholes, steps, strict=True):
        length = prompt.shape[1]
        close(torch.cat(logits, 1), model(whole, prompt_mask=leading(whole, length)).logits[:, length:])


@pytest.mark.support("threads that share a model")
def test_threads_share_a_model():
    """Guards against module-global state, or state that is not kept apart by thread."""
    model = para()
    prompts = [tokens(1, 4 + i, seed=i) for i in range(6)]
    expected = [generate(model, prompt, new=12).sequences.tolist() for prompt in prompts]
    actual = [None] * len(prompts)

    def work(i):
        for use_cache in (True, False):
            actual[i] = generate(model, prompts[i], new=12, use_cache=use_cache).sequences.tolist()
            if actual[i] != expected[i]:
                return

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert actual == expected


@torch.no_grad()
def test_nothing_outlives_its_cache():
    model = para()
    cache = model(tokens(), use_cache=True).past_key_values
    vectors = [weakref.ref(vector) for vector in cache.para_vectors.vectors.values() if vector is not None]
    assert len(vectors) == 3 * 3
    del cache
    gc.collect()
    assert not any(vector() is not None for vector in vectors)


@torch.no_grad()
def test_a_reset_static_cache_takes_a_new_prompt():
    """Guards against vectors of the last prompt being read from a static cache that is used again."""
    model = para()
    cache = StaticCache(config=model.config, max_cache_len=32)
    for seed in (1, 2):
        prompt = tokens(2, 6, seed=seed)
        generated = generate(model, prompt, past_key_values=cache, disable_compile=True)
        close(torch.stack(generated.logits, 1), teacher_forced(model, generated.sequences, 6))
        cache.reset()


class TestRefusals:
    @torch.no_grad()
    def test_chunked_prefill(self):
        model = para()
        prompt = tokens(1, 8)
        with pytest.raises(ValueError, match="prefill_chunk_size=4"):
            generate(model, prompt, prefill_chunk_size=4)
        cache = model(prompt[:, :4], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="whole prompt in one call"):
            model(prompt[:, 4:], past_key_values=cache)

    @torch.no_grad()
    def test_several_tokens_after_the_prompt_when_the_caller_says_so(self):
        model = para()
        whole = tokens(2, 9)
        cache = model(whole[:, :5], use_cache=True).past_key_values
        rest = model(whole[:, 5:], past_key_values=cache, prompt_mask=torch.zeros(2, 4, dtype=torch.bool)).logits
        close(rest, model(whole, prompt_mask=leading(whole, 5)).logits[:, 5:])

    @torch.no_grad()
    def test_a_prefix_of_another_prompt(self):
        model = para()
        cache = model(tokens(1, 4), use_cache=True).past_key_values
        prompt = torch.cat((tokens(1, 4), tokens(1, 5, seed=4)), 1)
        with pytest.raises(ValueError, match="prefix from another prompt"):
            generate(model, prompt, past_key_values=cache)

    @torch.no_grad()
    def test_a_prefix_whose_rest_is_passed_alone(self):
        """Guards against a prompt that looks short, because a cache holds its beginning."""
        model = para()
        cache = model(tokens(1, 6), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="prefix from another prompt"):
            generate(model, tokens(1, 4, seed=4), past_key_values=cache, attention_mask=torch.ones(1, 10).long())
        assert cache.get_seq_length() == 6

    @torch.no_grad()
    def test_a_prompt_whose_last_token_is_left_to_generate(self):
        """Guards against a prompt in two parts, whose second part looks like a decoding step."""
        model, prompt = para(), tokens(2, 6)
        cache = model(prompt[:, :-1], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="vectors of a prompt of 5"):
            generate(model, prompt, past_key_values=cache)
        says = {"prompt_mask": torch.zeros_like(prompt, dtype=torch.bool)}
        generated = generate(model, prompt, past_key_values=cache, **says)
        close(torch.stack(generated.logits, 1), teacher_forced(model, generated.sequences, 5, since=6))

    @torch.no_grad()
    def test_a_prefix_that_generate_filled(self):
        """Guards against any text after a prompt of `generate` being taken for its answer."""
        model = para()
        cache = DynamicCache(config=model.config)
        answered = generate(model, tokens(1, 6), new=1, past_key_values=cache).sequences
        answered[:, -1] = (answered[:, -1] + 1) % 80
        prompt = torch.cat((answered, tokens(1, 4, seed=9)), 1)
        with pytest.raises(ValueError, match="prefix from another prompt"):
            generate(model, prompt, past_key_values=cache)

    @torch.no_grad()
    def test_a_prompt_mask_that_marks_more_than_the_cache_knows(self):
        model = para()
        cache = DynamicCache(config=model.config)
        answer = generate(model, tokens(1, 6), past_key_values=cache).sequences
        second = torch.cat((answer, tokens(1, 4, seed=9)), 1)
        with pytest.raises(ValueError, match="vectors of a prompt of 6"):
            generate(model, second, past_key_values=cache, prompt_mask=leading(second, 9))

    @torch.no_grad()
    def test_a_prompt_mask_of_another_shape_in_generate(self):
        model = para()
        with pytest.raises(ValueError, match=r"prompt_mask has shape \(2, 3\), but generate was given 2 rows of 7"):
            generate(model, tokens(), prompt_mask=torch.ones(2, 3, dtype=torch.bool))

    @torch.no_grad()
    def test_a_prefix_of_the_base_model(self):
        model = para()
        with model.disable_adapter():
            cache = model(tokens(1, 4), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="with its PARA adapter active"):
            model(tokens(1, 1), past_key_values=cache)

    @torch.no_grad()
    def test_a_prefix_of_another_model_or_adapter(self):
        model, other = para(), para(seed=3)
        cache = model(tokens(1, 4), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="not filled by this model"):
            other(tokens(1, 1), past_key_values=cache)
        model.add_adapter("second", ParaConfig(r=2))
        model.set_adapter("second")
        with pytest.raises(ValueError, match=r"filled with the adapters \['default'\], but \['second'\]"):
            model(tokens(1, 1), past_key_values=cache)

    @torch.no_grad()
    def test_other_rows_than_the_cache_has(self):
        model = para()
        cache = model(tokens(2, 4), use_cache=True).past_key_values
        with pytest.raises(ValueError, match="prompts of 2 rows, but this call has 3"):
            model(tokens(3, 1), past_key_values=cache)

    @torch.no_grad()
    def test_a_prompt_mask_of_another_shape(self):
        with pytest.raises(ValueError, match=r"prompt_mask has shape \(2, 3\), but the call has 2 rows of 7"):
            para()(tokens(), prompt_mask=torch.ones(2, 3, dtype=torch.bool))

    @torch.no_grad()
    def test_after_a_failed_call_the_model_works_as_before(self):
        """Guards against a call that stays open after an exception, under which the next one would run."""
        model = para()
        expected = model(tokens()).logits
        backbone, head = model.get_base_model().model, model.get_base_model().lm_head
        with pytest.raises(IndexError):
            model(torch.full((2, 7), 10_000), prompt_mask=leading(tokens(), 2))
        close(head(backbone(tokens()).last_hidden_state), expected)
        with pytest.raises(ValueError, match="prompt_mask has shape"):
            model(tokens(), prompt_mask=torch.ones(1, 1, dtype=torch.bool))
        close(head(backbone(tokens()).last_hidden_state), expected)
        close(model(tokens()).logits, expected)

    @torch.no_grad()
    def test_a_block_alone_has_no_prompt(self):
        model = para().get_base_model()
        with pytest.raises(RuntimeError, match="outside of a call of its model"):
            model.model.layers[0].mlp(torch.randn(1, 3, 16))


@torch.no_grad()
def test_positional_arguments_are_understood():
    model = para().get_base_model()
    batch, mask = tokens(), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    close(model(batch, mask).logits, model(input_ids=batch, attention_mask=mask).logits)


@torch.no_grad()
def test_a_call_within_generate_has_its_own_prompt():
    """Guards against the length of the running generation's prompt being used for a call with other text."""
    model = para().get_base_model()
    other = tokens(1, 11, seed=7)
    expected, seen = model(other).logits, []

    class Peeking:
        def __call__(self, ids, scores):
            seen.append(model(other).logits)
            return scores

    prompt = tokens(1, 4)
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=2,
        logits_processor=LogitsProcessorList([Peeking()]),
    )
    for logits in seen:
        close(logits, expected)


NEGATIVE = {
    "the last token": None,
    "another prompt": tokens(2, 4, seed=5),
    "the prompt's beginning": tokens(2, 6)[:, :5],
    "the prompt and more": torch.cat((tokens(2, 6), tokens(2, 4, seed=5)), 1),
    "the prompt and a token": torch.cat((tokens(2, 6), tokens(2, 1, seed=5)), 1),
    "the prompt": tokens(2, 6),
}


@pytest.mark.parametrize("processor", [False, True], ids=["guidance_scale", "logits processor"])
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("negative", sorted(NEGATIVE))
@torch.no_grad()
def test_guidance_equals_two_teacher_forced_passes(negative, use_cache, processor):
    """Guards against a negative prompt that grows with the answer, or is cut at the length of the prompt."""
    model, ids, scale = para(), NEGATIVE[negative], 1.7
    prompt = tokens(2, 6)
    if processor:
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(
            scale, model.get_base_model(), unconditional_ids=ids, use_cache=use_cache
        )
        guidance = {"logits_processor": LogitsProcessorList([guide])}
    else:
        guidance = {"guidance_scale": scale, "negative_prompt_ids": ids}
    mask = leading(prompt, 3)
    kwargs = {**GREEDY, "use_cache": use_cache, "prompt_mask": mask, "eos_token_id": VOCAB, "output_scores": True}
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, **guidance, **kwargs)
    if ids is None:
        ids = prompt[:, -1:]
    answers = generated.sequences[:, 6:]
    sure = model(generated.sequences, prompt_mask=leading(generated.sequences, 3)).logits[:, 5:-1].log_softmax(-1)
    both = torch.cat((ids, answers), 1)
    length = 3 if negative == "the prompt" else ids.shape[1]
    unsure = model(both, prompt_mask=leading(both, length)).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
    close(torch.stack(generated.scores, 1), scale * (sure - unsure) + unsure)


@pytest.mark.parametrize("beams", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("use_cache", [True, False])
@torch.no_grad()
def test_generation_without_a_prompt(use_cache, beams):
    """Guards against a prompt that grows with the answer where `generate` begins from the first token alone."""
    model = para()
    generated = model.generate(**GREEDY, max_new_tokens=6, min_new_tokens=6, use_cache=use_cache, **beams)
    if beams:
        cached = model.generate(**GREEDY, max_new_tokens=6, min_new_tokens=6, **beams)
        assert torch.equal(generated.sequences, cached.sequences)
        close(generated.sequences_scores, cached.sequences_scores)
    else:
        close(torch.stack(generated.logits, 1), teacher_forced(model, generated.sequences, 1))


@torch.no_grad()
def test_gradients_are_not_needed_and_inference_mode_works():
    model = para()
    prompt = tokens()
    expected = generate(model, prompt).sequences
    with torch.inference_mode():
        assert torch.equal(generate(model, prompt).sequences, expected)


@pytest.mark.support("bfloat16")
@torch.no_grad()
def test_bfloat16_and_autocast():
    """A bfloat16 model computes its vectors in float32; autocast does not reach into them."""
    model = para()
    prompt = tokens()
    expected = model(prompt).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (model(prompt).logits.float() - expected).abs().max() < 0.2 * expected.abs().max()
    half = randomize(get_peft_model(tiny("llama").to(torch.bfloat16), ParaConfig(r=4, task_type="CAUSAL_LM"))).eval()
    assert (
        next(iter(half.get_base_model().model.layers[0].self_attn.q_proj.para_generator.values())).down.dtype
        == torch.float32
    )
    generated = generate(half, prompt)
    torch.testing.assert_close(
        torch.stack(generated.logits, 1).float(),
        teacher_forced(half, generated.sequences, 7).float(),
        atol=0.15,
        rtol=0.05,
    )
