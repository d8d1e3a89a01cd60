"""Where the prompt ends, for each source that can say so."""

import pytest
import torch
from para_models import para, tokens

from peft_fanlora.para.prompt import Inputs, attended_tokens, causal_prompt, whole_input


def locate(training=True, prompt_end=None, tokens_each=6, rows=1, attended=None, **inputs):
    attended = torch.ones(rows, tokens_each, dtype=torch.bool) if attended is None else attended
    return causal_prompt(Inputs(attended=attended, **inputs), prompt_end, training)


def mask_of(prompt) -> list:
    return prompt.mask.int().tolist()


IDS = torch.tensor([[5, 6, 7, 8, 6, 7]])
LABELS = torch.tensor([[-100, -100, -100, 8, -100, 7]])


def test_the_labels_leading_run():
    """Multi-turn data: later runs of -100 are later user turns, which the first vectors serve without seeing."""
    assert mask_of(locate(labels=LABELS)) == [[[1, 1, 1, 0, 0, 0]]]


def test_the_first_end_comes_before_the_labels():
    assert mask_of(locate(input_ids=IDS, labels=LABELS, prompt_end=(6,))) == [[[1, 1, 0, 0, 0, 0]]]
    assert mask_of(locate(input_ids=IDS, labels=LABELS, prompt_end=(6, 7))) == [[[1, 1, 1, 0, 0, 0]]]


def test_prompt_mask_comes_first():
    prompt_mask = torch.tensor([[True, False, True, False, False, False]])
    assert mask_of(locate(input_ids=IDS, labels=LABELS, prompt_end=(6,), prompt_mask=prompt_mask)) == [
        [[1, 0, 1, 0, 0, 0]]
    ]


def test_without_a_match_the_labels_decide():
    assert mask_of(locate(input_ids=IDS, labels=LABELS, prompt_end=(9,))) == [[[1, 1, 1, 0, 0, 0]]]


def test_each_row_by_the_first_rule_that_finds_it():
    ids = torch.cat((IDS, torch.tensor([[5, 5, 5, 5, 5, 5]])))
    labels = LABELS.repeat(2, 1)
    prompt = locate(input_ids=ids, labels=labels, prompt_end=(6,), rows=2)
    assert mask_of(prompt) == [[[1, 1, 0, 0, 0, 0]], [[1, 1, 1, 0, 0, 0]]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_no_prompt(side):
    """Guards against labels of -100 on padding being taken for a prompt."""
    attended = torch.tensor([[0, 0, 1, 1, 1, 1]] if side == "left" else [[1, 1, 1, 1, 0, 0]]).bool()
    plain = torch.where(attended, torch.tensor([[5, 5, 5, 5, 5, 5]]), -100)
    with pytest.raises(ValueError, match="in 1 of 1 training sequences"):
        locate(labels=plain, attended=attended)
    first = int(attended.int().argmax())
    labels = plain.clone()
    labels[0, first : first + 2] = -100
    expected = [0] * 6
    expected[first : first + 2] = [1, 1]
    assert mask_of(locate(labels=labels, attended=attended)) == [[expected]]


def test_a_lone_first_token_is_no_prompt():
    """Guards against packed plain text, where the label of each sequence's first token is -100."""
    with pytest.raises(ValueError, match="do not begin with a run of -100"):
        locate(labels=torch.tensor([[-100, 6, 7, 8, 6, 7]]))


def test_packed_sequences_have_a_prompt_each():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    labels = torch.tensor([[-100, -100, 7, -100, -100, 7]])
    prompt = locate(labels=labels, position_ids=positions)
    assert mask_of(prompt) == [[[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]]
    assert prompt.segments.tolist() == [[0, 0, 0, 1, 1, 1]]


def test_one_packed_sequence_without_a_prompt_raises():
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="in 1 of 2 training sequences"):
        locate(labels=torch.tensor([[-100, -100, 7, -100, 8, 7]]), position_ids=positions)


def test_packed_padding_needs_no_prompt():
    """Padding at the end of a packed row has position 0 each, so that it looks like sequences of one token."""
    positions = torch.tensor([[0, 1, 2, 3, 0, 0]])
    labels = torch.tensor([[-100, -100, 7, 8, -100, -100]])
    assert mask_of(locate(labels=labels, position_ids=positions))[0][0] == [1, 1, 0, 0, 0, 0]
    assert mask_of(locate(input_ids=IDS, position_ids=positions, prompt_end=(6,)))[0][0] == [1, 1, 0, 0, 0, 0]


def test_an_end_does_not_reach_over_the_border_of_a_sequence():
    positions = torch.tensor([[0, 1, 0, 1, 2, 3]])
    ids = torch.tensor([[5, 6, 7, 8, 6, 7]])
    prompt = locate(input_ids=ids, position_ids=positions, prompt_end=(6, 7), training=False)
    assert mask_of(prompt) == [[[1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1]]]


def test_positions_of_left_padding_are_no_packing():
    attended = torch.tensor([[0, 0, 1, 1, 1, 1]]).bool()
    prompt = locate(training=False, attended=attended, position_ids=torch.tensor([[0, 0, 0, 1, 2, 3]]))
    assert prompt.segments is None
    assert mask_of(prompt) == [[[0, 0, 1, 1, 1, 1]]]


def test_sequences_without_a_loss_need_no_prompt():
    labels = torch.tensor([[-100] * 6, [-100, -100, 7, 7, 7, 7]])
    assert mask_of(locate(labels=labels, rows=2))[1] == [[1, 1, 0, 0, 0, 0]]


def test_generation_knows_its_prompt():
    """Guards against an end that turns up in the answer: without a cache it would change the prompt midway."""
    assert mask_of(locate(input_ids=IDS, generated_from=4)) == [[[1, 1, 1, 1, 0, 0]]]
    assert mask_of(locate(input_ids=IDS, generated_from=4, prompt_end=(6, 7, 8)))[0][0] == [1, 1, 1, 1, 0, 0]
    assert mask_of(locate(input_ids=IDS, generated_from=4, prompt_end=(8, 6)))[0][0] == [1, 1, 1, 1, 0, 0]
    assert mask_of(locate(input_ids=IDS, generated_from=4, prompt_end=(6,)))[0][0] == [1, 1, 0, 0, 0, 0]


def test_inference_takes_all_attended_tokens():
    attended = torch.tensor([[0, 1, 1, 1, 1, 0]]).bool()
    assert mask_of(locate(training=False, attended=attended)) == [[[0, 1, 1, 1, 1, 0]]]


def test_an_encoder_takes_all_attended_tokens():
    attended = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
    assert mask_of(whole_input(Inputs(attended=attended, labels=torch.tensor([1])))) == [[[1, 1, 1, 1, 0, 0]]]


def test_attention_masks_of_every_form():
    two = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    causal = torch.ones(4, 4, dtype=torch.bool).tril() & two.bool()[:, None, None, :]
    added = torch.where(causal, 0.0, torch.finfo(torch.float32).min)
    for mask in (two, causal, added, {"sliding": None, "full": causal}):
        assert attended_tokens(mask, 2, 4, torch.device("cpu")).int().tolist() == two.tolist()
    assert attended_tokens(None, 2, 4, torch.device("cpu")).all()
    assert attended_tokens(torch.tensor([[0, 1, 1, 1, 1]]), 1, 2, torch.device("cpu")).tolist() == [[True, True]]


@pytest.mark.support("packed sequences")
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3"])
@torch.no_grad()
def test_a_packed_batch_equals_its_sequences_alone(name):
    """Guards against one prompt a row in packed batches, whose vectors would mix the prompts of strangers."""
    model = para(name).train()
    first, second = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
    packed = torch.cat((first, second), 1)
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None]

    def labels(ids, prompt):
        out = ids.clone()
        out[:, :prompt] = -100
        return out

    together = model(
        packed, position_ids=positions, use_cache=False, labels=torch.cat((labels(first, 2), labels(second, 4)), 1)
    ).logits
    alone = [model(first, labels=labels(first, 2)).logits, model(second, labels=labels(second, 4)).logits]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    swapped = model(
        packed, position_ids=positions, use_cache=False, labels=torch.cat((labels(first, 3), labels(second, 4)), 1)
    ).logits
    assert (swapped[:, :5] - together[:, :5]).abs().max() > 1e-3
    torch.testing.assert_close(swapped[:, 5:], together[:, 5:], atol=1e-6, rtol=1e-5)


def test_prompt_end_in_training_without_labels():
    """A custom loss, label smoothing and preference trainers call the model without labels."""
    ids = tokens().clamp(max=80)
    ids[:, 3] = 88
    with_end, with_mask = para(prompt_end_token_ids=[88]).train(), para().train()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :4] = True
    expected = with_mask(ids, prompt_mask=mask).logits
    torch.testing.assert_close(with_end(ids).logits, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[88\] does not occur there"):
        with_end(tokens(seed=1).clamp(max=80))
