"""What belongs to a call, to a text and to a running `generate`: plain values, no model."""

import pickle

import pytest
import torch

from peft_fanlora.para.state import Call, Generation, ParaState, Text
from peft_fanlora.serving.call import Arguments


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def call(**options) -> Call:
    return Call(Arguments(torch.nn.Identity(), {}), **options)


def longer(ids: torch.Tensor, tokens: int = 1) -> torch.Tensor:
    return torch.cat((ids, torch.full((len(ids), tokens), 9)), 1)


def test_vectors_are_made_again_unless_they_are_from_a_cache():
    vectors = {"layer": torch.ones(1)}
    made = {("block", "adapter"): {"layer": torch.ones(1)}}
    own = call(vectors=vectors, made=made, batch=2)
    again = own.without_vectors()
    assert (again.vectors, again.made, again.batch) == ({}, {}, 2)
    assert (own.vectors, own.made) == (vectors, made)
    cached = call(vectors=vectors, made=made, from_cache=True)
    assert cached.without_vectors() is cached


@pytest.mark.parametrize(("batch", "tokens", "expected"), [(2, 3, 6), (None, 3, None), (2, None, None)])
def test_the_number_of_tokens_is_that_of_all_rows(batch, tokens, expected):
    assert call(batch=batch, tokens=tokens).num_tokens == expected


def test_a_text_begins_with_its_prompt():
    text = Text(IDS, 4)
    assert text.begins(IDS)
    assert text.begins(longer(IDS))
    assert not text.begins(IDS[:, :2])
    assert not text.begins(longer(IDS + 1))
    assert not text.begins(torch.cat((IDS[:1], IDS[:1])))


def test_rows_of_a_prompt_may_be_repeated_next_to_each_other():
    text = Text(IDS, 4)
    assert text.begins(longer(IDS.repeat_interleave(3, 0)))
    assert not text.begins(IDS.repeat(2, 1))
    assert not text.begins(torch.cat((IDS, IDS[1:])))


def test_the_first_call_is_the_prompt():
    generation = Generation()
    assert generation.prompt_of(IDS, 3) == (3, True)
    assert generation.prompt_of(longer(IDS), 4) == (3, True)
    assert generation.prompt_of(None, 1) == (3, True)
    assert generation.length == 3
    assert generation.input_ids is IDS
    assert not generation.others


def test_a_prompt_of_embeddings_has_no_ids_to_compare():
    generation = Generation()
    assert generation.prompt_of(None, 5) == (5, True)
    assert generation.prompt_of(IDS, 3) == (5, True)


def test_another_text_is_all_prompt_and_then_continued():
    """As the negative prompt of guidance, which grows with the text beside it."""
    generation, other = Generation(3, IDS), IDS + 3
    assert generation.prompt_of(other[:, :2], 2) == (None, False)
    assert generation.prompt_of(IDS, 3) == (3, True)
    for added in (1, 2):
        assert generation.prompt_of(longer(other[:, :2], added), 2 + added) == (2, False)
    assert len(generation.others) == 1
    assert generation.prompt_of(longer(other[:, :2], 5), 7) == (None, False), "some of its tokens are missing"
    assert len(generation.others) == 2


def test_the_mask_of_a_prompt_ends_where_the_prompt_does():
    mask = torch.tensor([[True, False, True]])
    generation = Generation(length=5, prompt_mask=mask)  # two tokens of the prompt are in a cache, without a mask
    assert generation.marked_from(2).tolist() == mask.tolist()
    assert generation.marked_from(0).tolist() == mask.tolist()
    assert generation.marked_from(3).tolist() == [[False, True]]
    assert generation.marked_from(5).tolist() == [[]]
    assert Generation(length=5).marked_from(0) is None
    assert Generation(prompt_mask=mask).marked_from(0) is None


def test_generations_have_names_of_their_own():
    assert Generation().identifier != Generation().identifier


@pytest.mark.parametrize(("context", "name"), [("using", "call"), ("generating", "generation"), ("mixing", "rows")])
def test_what_is_current_is_so_within_a_context(context, name):
    state, first, second = ParaState(), object(), object()
    with getattr(state, context)(first):
        with pytest.raises(RuntimeError), getattr(state, context)(second):
            assert getattr(state, name) is second
            raise RuntimeError
        assert getattr(state, name) is first
    assert getattr(state, name) is None


def test_a_step_is_the_one_before_once_it_has_ended():
    state, step = ParaState(), object()
    with pytest.raises(RuntimeError), state.decoding(step):
        assert state.step is step
        assert state.step_before is None
        raise RuntimeError
    assert state.step is None
    assert state.step_before is step


def test_a_copy_is_in_no_call():
    state = ParaState()
    with state.using(call()):
        copied = pickle.loads(pickle.dumps(state))
    assert isinstance(copied, ParaState)
    assert copied.call is None
