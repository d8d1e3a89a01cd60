"""A tokenizer of a few words, and text made of its words."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from integration_tests.helpers.models import TINY, VOCAB


WORDS = ["<pad>", "<s>", "</s>", "<unk>", "user", "assistant", "answer", *(f"w{i}" for i in range(VOCAB - 7))]
TEMPLATE = (
    "{% if tools %}<s> tools {{ tools[0].function.name }} </s>{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<s> assistant {% generation %}"
    "{{ m.tool_calls[0].function.name if m.tool_calls else m.content }} </s>"
    "{% endgeneration %}{% else %}<s> {{ m.role }} {{ m.content }} </s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Makes a tokenizer of as many words as the tiny models know, whose chat template marks what the assistant says."""
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.add_special_tokens(["<s>", "</s>"])
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=raw, chat_template=TEMPLATE, **special)


def save_base(folder: Path, architecture: str = "llama") -> PreTrainedModel:
    """Writes a tiny model and the tokenizer to a folder, and returns the model."""
    model = TINY[architecture].base()
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def sentences(rows: int, seed: int = 0) -> list[str]:
    """Makes text in which each word is followed by its successor, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, VOCAB - 20, (rows,), generator=generator).tolist()
    return [" ".join(f"w{start + step}" for step in range(8)) for start in starts]
