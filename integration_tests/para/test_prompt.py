"""Where the prompt ends, for each source that can say so."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModel,
    DataCollatorWithFlattening,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    RobertaConfig,
    RobertaModel,
)

from integration_tests.helpers.models import CAUSAL, LLAMA, SIZES, VOCAB, para, randomize, tokens
from peft_fanlora import ParaConfig
from peft_fanlora.para.packing import numbered_sequences
from peft_fanlora.para.prompt import Inputs, Prompt, attended_tokens, causal_prompt, whole_input


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


def test_each_row_has_an_end_of_its_own():
    ids = torch.tensor([[5, 6, 7, 8, 9, 9], [5, 5, 5, 6, 7, 8]])
    assert mask_of(locate(input_ids=ids, prompt_end=(6, 7), rows=2)) == [[[1, 1, 1, 0, 0, 0]], [[1, 1, 1, 1, 1, 0]]]


def test_a_prompt_reaches_to_its_last_token():
    mask = torch.tensor([[[0, 1, 1, 0]], [[1, 0, 0, 0]]]).bool()
    assert [Prompt(mask).length(4), Prompt(mask & False).length(4), Prompt(None).length(4)] == [3, 0, 4]
    whole = Prompt(None).mask_for(2, 3, torch.device("cpu"))
    assert whole.dtype == torch.bool and whole.tolist() == [[[True] * 3]] * 2


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


def test_a_prompt_mask_of_packed_sequences_is_for_each_of_them():
    positions, prompt_mask = torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.tensor([[1, 0, 0, 1, 1, 0]]).bool()
    prompt = locate(prompt_mask=prompt_mask, position_ids=positions)
    assert mask_of(prompt) == [[[1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]]
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


def test_two_tokens_without_a_prompt_raise():
    with pytest.raises(ValueError, match="in 1 of 1 training sequences"):
        locate(labels=torch.tensor([[6, 7]]), tokens_each=2)


def test_the_end_may_be_all_there_is():
    assert mask_of(locate(input_ids=torch.tensor([[6, 7]]), prompt_end=(6, 7), tokens_each=2)) == [[[1, 1]]]


def test_without_ids_the_labels_decide():
    assert mask_of(locate(labels=LABELS, prompt_end=(6,))) == [[[1, 1, 1, 0, 0, 0]]]


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
    with pytest.raises(ValueError, match="in 1 of 1 training sequences"):
        locate(labels=torch.tensor([[-100] * 6, [7] * 6]), rows=2)


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


def segments_of(**inputs) -> list | None:
    prompt = locate(training=False, **inputs)
    return None if prompt.segments is None else prompt.segments.tolist()


@pytest.mark.parametrize("start", [0, 1, 2, 7])
def test_positions_may_begin_anywhere(start):
    """Guards against sequences that are told apart by position 0 alone."""
    positions = start + torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert segments_of(position_ids=positions) == [[0, 0, 0, 1, 1, 2]]
    assert segments_of(position_ids=positions, by_jumps=True) == [[0, 0, 0, 1, 1, 2]]


def test_sequences_of_one_token_begin_each_time():
    assert segments_of(position_ids=torch.tensor([[1, 1, 1, 2, 3, 1]])) == [[0, 1, 2, 2, 2, 3]]


def test_jumps_ahead_count_where_transformers_goes_by_them():
    positions = torch.tensor([[0, 1, 2, 9, 10, 11]])
    assert segments_of(position_ids=positions) is None
    assert segments_of(position_ids=positions, by_jumps=True) == [[0, 0, 0, 1, 1, 1]]


@pytest.mark.parametrize("clamped", [0, 1])
def test_clamped_positions_of_padding_are_no_packing(clamped):
    """Guards against left padding, at position 0 or 1, or padding in the middle, being taken for a sequence."""
    attended = torch.tensor([[0, 0, 1, 1, 0, 1]]).bool()
    positions = torch.tensor([[clamped, clamped, 0, 1, clamped, 2]])
    assert segments_of(attended=attended, position_ids=positions) is None


def test_positions_of_multimodal_models():
    """Time stands still within an image, whose height and width go up and down; text positions come first of four."""
    one = torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
    text = torch.arange(6).view(1, 1, 6)
    assert segments_of(position_ids=one) is None
    assert segments_of(position_ids=one, by_jumps=True) is None
    assert segments_of(position_ids=torch.cat((text, one)), by_jumps=True) is None
    packed = torch.tensor([[0, 1, 2, 0, 0, 1]]).expand(3, 1, 6)
    assert segments_of(position_ids=packed) == [[0, 0, 0, 1, 2, 2]]
    assert segments_of(position_ids=torch.cat((packed[:1], one)), by_jumps=True) == [[0, 0, 0, 1, 2, 2]]


def test_other_signs_of_packed_sequences():
    attended = torch.ones(2, 4, dtype=torch.bool)

    def numbers(mask=None, **named):
        return segments_of(attended=attended, numbers=numbered_sequences(named, mask, attended))

    assert numbers() is None
    assert numbers(cu_seq_lens_q=torch.tensor([0, 3, 4, 6, 8])) == [[0, 0, 0, 1], [0, 0, 1, 1]]
    assert numbers(cu_seq_lens_k=torch.tensor([0, 4, 6], dtype=torch.int32)) == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert numbers(cu_seq_lens_q=torch.tensor([0, 4, 8])) is None
    assert numbers(seq_idx=torch.tensor([[0, 0, 1, 1], [3, 3, 3, 0]])) == [[0, 0, 1, 1], [0, 0, 0, 1]]
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    blocks = torch.block_diag(*torch.ones(2, 2, 2)).bool() & causal
    both = torch.stack((causal, blocks)).unsqueeze(1)
    assert numbers(both) == [[0, 0, 0, 0], [0, 0, 1, 1]]
    assert numbers(torch.where(both, 0.0, -1e9)) == [[0, 0, 0, 0], [0, 0, 1, 1]]
    chunks = {"full_attention": causal[None, None].expand(2, 1, 4, 4), "chunked_attention": both}
    assert numbers(chunks) is None, "a chunk of a row is not a sequence"


def test_padding_between_packed_sequences_belongs_to_none():
    attended = torch.tensor([[1, 1, 0, 1, 1, 0]]).bool()
    numbers = numbered_sequences({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, None, attended)
    prompt = locate(training=False, attended=attended, numbers=numbers)
    assert mask_of(prompt) == [[[1, 1, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0]]]


FIRST, SECOND = tokens(1, 5, seed=1), tokens(1, 7, seed=2)
PACKED = torch.cat((FIRST, SECOND), 1)
BLOCKS = torch.block_diag(torch.ones(5, 5), torch.ones(7, 7)).bool()[None, None]


def headless(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config_class, fields = CAUSAL[name]
    return randomize(get_peft_model(AutoModel.from_config(config_class(**fields)), ParaConfig(r=4))).eval()


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize("make", [para, headless], ids=["language head", "no head"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
@torch.no_grad()
def test_packed_sequences_equal_each_alone(name, make, start):
    """Guards against one prompt for all sequences of a row, whichever position they begin at."""
    model = make(name)
    positions = [torch.arange(5)[None] + start, torch.arange(7)[None] + start]
    together = model(PACKED, position_ids=torch.cat(positions, 1), use_cache=False)[0]
    alone = [model(ids, position_ids=each)[0] for ids, each in zip((FIRST, SECOND), positions, strict=True)]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [para, headless], ids=["language head", "no head"])
@torch.no_grad()
def test_a_row_whose_positions_jump_is_what_transformers_takes_it_for(make):
    """Without a cache or a mask transformers keeps the parts of such a row apart; else they are one sequence."""
    model = make("llama")
    positions = [torch.arange(5)[None], torch.arange(7)[None] + 9]
    call = {"input_ids": PACKED, "position_ids": torch.cat(positions, 1)}
    apart = model(**call, use_cache=False)[0]
    alone = [model(ids, position_ids=each)[0] for ids, each in zip((FIRST, SECOND), positions, strict=True)]
    torch.testing.assert_close(apart, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)
    whole = model(**call, attention_mask=torch.ones_like(PACKED), use_cache=False)[0]
    cached = model(**call, use_cache=True)
    torch.testing.assert_close(cached[0], whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        model(**call, use_cache=False, attention_mask=torch.ones(12, 12).tril().bool()[None, None])[0], whole
    )
    step = model(FIRST[:, :1], position_ids=torch.tensor([[16]]), past_key_values=cached.past_key_values)[0]
    assert torch.isfinite(step).all()


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("sign", ["positions", "mask alone"])
@torch.no_grad()
def test_a_block_mask_keeps_prompts_apart(sign, additive):
    model = headless("llama")
    mask = BLOCKS.tril()
    positions = torch.arange(12)[None] if sign == "mask alone" else torch.cat((torch.arange(5), torch.arange(7)))[None]
    together = model(
        PACKED, position_ids=positions, attention_mask=torch.where(mask, 0.0, -1e9) if additive else mask
    )[0]
    alone = [model(FIRST, position_ids=positions[:, :5])[0], model(SECOND, position_ids=positions[:, 5:])[0]]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_branches_of_one_prompt_are_one_sequence():
    """Guards against a row whose branches each see the common prompt, and begin at the same position, being cut."""
    model = para()
    mask = torch.ones(1, 1, 9, 9).tril().bool()
    mask[:, :, 7:, 5:7] = False
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 5, 6]])
    ids, prompt = tokens(1, 9), torch.arange(9)[None] < 5
    logits = model(ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt).logits
    for branch in ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 7, 8]):
        alone = model(ids[:, branch], prompt_mask=prompt[:, branch]).logits
        torch.testing.assert_close(logits[:, branch], alone, atol=1e-5, rtol=1e-5)


LABELLED = [
    {"input_ids": FIRST[0], "labels": torch.tensor([-100, -100, *FIRST[0, 2:]])},
    {"input_ids": SECOND[0], "labels": torch.tensor([-100] * 4 + SECOND[0, 4:].tolist())},
]


def rows_of(batch: list, start: int = 0) -> list:
    return [
        {
            name: value[None]
            for name, value in {**row, "position_ids": start + torch.arange(len(row["labels"]))}.items()
        }
        for row in batch
    ]


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("more", [{}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}])
@torch.no_grad()
def test_flattened_batches_in_training(start, more):
    model = para().train()
    batch = DataCollatorWithFlattening(position_ids_start=start, **more)(LABELLED)
    together = model(**batch, use_cache=False).logits
    alone = [model(**row).logits for row in rows_of(LABELLED, start)]
    torch.testing.assert_close(together, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("option", ["return_flash_attn_kwargs", "return_seq_idx"])
@torch.no_grad()
def test_flattened_batches_without_positions(option):
    """Attention on a CPU does not read these signs, so that the queries of the first layer are compared."""
    model, queries = para().train(), []
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda layer, args, output: queries.append(output))
    batch = DataCollatorWithFlattening(return_position_ids=False, **{option: True})(LABELLED)
    for call in (batch, *rows_of(LABELLED)):
        model(**call, use_cache=False)
    torch.testing.assert_close(queries[0], torch.cat(queries[1:], 1), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("strategy", ["padding-free", "packed"])
@torch.no_grad()
def test_the_padding_free_batches_of_trl(strategy):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    model = para().train()
    labels = [[-100, -100, *FIRST[0, 2:].tolist()], [-100] * 4 + SECOND[0, 4:].tolist()]
    if strategy == "packed":
        rows = [{"input_ids": PACKED[0].tolist(), "labels": [*labels[0], *labels[1]], "seq_lengths": [5, 7]}]
    else:
        rows = [
            {"input_ids": ids[0].tolist(), "labels": each} for ids, each in zip((FIRST, SECOND), labels, strict=True)
        ]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True, pad_to_multiple_of=8)(rows)
    together = model(**batch, use_cache=False).logits
    alone = [model(ids, labels=torch.tensor([each])).logits for ids, each in zip((FIRST, SECOND), labels, strict=True)]
    torch.testing.assert_close(together[:, :12], torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_packed_sequences_of_an_encoder_have_a_prompt_each():
    """Positions of RoBERTa begin at 2; the mask keeps the sequences apart as flash attention would."""
    torch.manual_seed(0)
    config = RobertaConfig(**SIZES, vocab_size=VOCAB)
    model = randomize(get_peft_model(RobertaModel(config), ParaConfig(r=4))).eval()
    positions = torch.cat((torch.arange(5), torch.arange(7)))[None] + 2
    alone = torch.cat((model(FIRST)[0], model(SECOND)[0]), 1)
    for signs in (
        {"attention_mask": BLOCKS},
        {"attention_mask": torch.where(BLOCKS, 0.0, -1e9), "cu_seq_lens_q": torch.tensor([0, 5, 12])},
    ):
        torch.testing.assert_close(model(PACKED, position_ids=positions, **signs)[0], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [3, 4])
@torch.no_grad()
def test_packed_sequences_with_positions_of_several_rows(rows):
    torch.manual_seed(0)
    text = {
        **LLAMA,
        "num_attention_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    }
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
    special = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
    base = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special)).eval()
    targets = r".*language_model.*\.(q_proj|v_proj|up_proj)"
    model = randomize(get_peft_model(base, ParaConfig(r=4, target_modules=targets))).eval()
    first, second = FIRST.clamp(min=10), SECOND.clamp(min=10)
    positions = torch.cat((torch.arange(5), torch.arange(7))).expand(rows, 1, 12)
    together = model(torch.cat((first, second), 1), position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(together[:, :5], model(first).logits, atol=1e-5, rtol=1e-5)
    if rows == 4:  # transformers' masks keep sequences apart by a row of text positions alone
        torch.testing.assert_close(together[:, 5:], model(second).logits, atol=1e-5, rtol=1e-5)


def test_packed_rows_of_an_encoder_decoder_model_are_refused():
    """Guards against vectors by the encoder's tokens on the tokens of the decoder."""
    model = para("bart", task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="a row of its own"):
        model(PACKED, decoder_input_ids=FIRST, cu_seq_lens_q=torch.tensor([0, 5, 12]))


def test_prompt_end_in_training_without_labels():
    """A custom loss, label smoothing and preference trainers call the model without labels."""
    ids = tokens().clamp(max=60)
    ids[:, 3] = 63
    with_end, with_mask = para(prompt_end_token_ids=[63]).train(), para().train()
    mask = torch.zeros_like(ids, dtype=torch.bool)
    mask[:, :4] = True
    expected = with_mask(ids, prompt_mask=mask).logits
    torch.testing.assert_close(with_end(ids).logits, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[63\] does not occur there"):
        with_end(tokens(seed=1).clamp(max=60))
