"""Reads from a tokenizer's chat template with which tokens a prompt ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prompt_end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids with which the tokenizer's chat template ends a prompt, for `ParaConfig`.

    What two prompts of different text have in common at their end is what the template puts there, such as
    "<|im_end|>\\n<|im_start|>assistant\\n". Only so much of it is kept as also precedes a finished answer: some
    templates open a thought that training data does not have.

    Args:
        tokenizer: a tokenizer with a chat template.

    Raises:
        ValueError: it has no chat template, or the template marks the end of prompts by no tokens of its own.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template to read the end of a prompt from: set "
            "ParaConfig(prompt_end_token_ids=…) to the ids of the text that ends each of your prompts, such as "
            "tokenizer.encode('\\nAnswer:', add_special_tokens=False)."
        )

    def render(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        asks = turns[-1][0] == "user"
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks))

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    text, other = render(("user", "How far is the sun?")), render(("user", "Name three rivers"))
    prompt = encode(text)
    conversation = encode(render(("user", "How far is the sun?"), ("assistant", "Eight minutes of light.")))
    # The template's own text is found as text, because words that the tokenizer does not know are all one token.
    own_text = text[len(text) - _common_prefix(text[::-1], other[::-1]) :]
    shared = _common_prefix(prompt[::-1], encode(own_text)[::-1])
    end = _common_prefix(prompt, conversation)
    marker = prompt[len(prompt) - shared : end]
    if not marker or _first_match(conversation, marker) + len(marker) != end:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} puts no tokens of its own between a prompt and its answer "
            f"(it gave {marker}): pass prompt_mask to the model, or train on prompt-completion data."
        )
    return marker


def _common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _first_match(tokens: Sequence[int], marker: Sequence[int]) -> int:
    width = len(marker)
    return next(i for i in range(len(tokens) - width + 1) if list(tokens[i : i + width]) == list(marker))
