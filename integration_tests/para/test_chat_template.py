"""The end of a prompt is read from the chat template."""

import pytest
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from peft_fanlora import get_prompt_end_token_ids


CHATML = (
    "{% for m in messages %}<|im_start|> {{ m.role }} \n {{ m.content }} <|im_end|> \n {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant \n {% endif %}"
)


THINKING = CHATML.replace("assistant \n {% endif", "assistant \n <think> {% endif")


INST = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST] {% else %}{{ m.content }} {% endif %}{% endfor %}"


NOTHING = "{% for m in messages %}{{ m.content }} {% endfor %}"


def tokenizer(template):
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "user", "assistant", "<think>", "[INST]", "[/INST]"]
    words += ["How", "far", "is", "the", "sun", "?", "Name", "three", "rivers", "Eight", "minutes", "of", "light", "."]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tf.PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=template, unk_token="<unk>")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, "<|im_end|> <|im_start|> assistant"),
        (THINKING, "<|im_end|> <|im_start|> assistant"),
        (INST, "[/INST]"),
    ],
)
def test_the_end_of_a_prompt_is_read_from_the_chat_template(template, expected):
    tok = tokenizer(template)
    assert tok.convert_ids_to_tokens(get_prompt_end_token_ids(tok)) == expected.split()


def test_templates_without_an_end_are_refused():
    with pytest.raises(ValueError, match="adds no tokens between a prompt and its answer"):
        get_prompt_end_token_ids(tokenizer(NOTHING))
    with pytest.raises(ValueError, match="has no chat template"):
        get_prompt_end_token_ids(tokenizer(None))
