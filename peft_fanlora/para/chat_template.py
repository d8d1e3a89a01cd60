"""Derives the tokens that end a prompt from a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def get_prompt_end_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that end a prompt in the tokenizer's chat template, for `ParaConfig`.

    These are the last tokens that two prompts with different text have in common, such as
    "<|im_end|>\\n<|im_start|>assistant\\n". Tokens that do not also precede a finished answer are dropped: some
    templates open a thinking section that training data does not contain.

    Args:
        tokenizer: a tokenizer with a chat template.

    Raises:
        ValueError: there is no chat template, or it adds no tokens between a prompt and its answer.
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
    # The common suffix is computed on text, since all words unknown to the tokenizer become the same token.
    own_text = text[len(text) - _common_prefix(text[::-1], other[::-1]) :]
    shared = _common_prefix(prompt[::-1], encode(own_text)[::-1])
    end = _common_prefix(prompt, conversation)
    marker = prompt[len(prompt) - shared : end]
    if not marker or _first_match(conversation, marker) + len(marker) != end:
        raise ValueError(
            f"The chat template of {tokenizer.name_or_path!r} adds no tokens between a prompt and its answer (found: "
            f"{marker}): pass prompt_mask to the model, or train on prompt-completion data."
        )
    return marker


def _common_prefix(a: Sequence[object], b: Sequence[object]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _first_match(tokens: Sequence[int], marker: Sequence[int]) -> int:
    width = len(marker)
    return next(i for i in range(len(tokens) - width + 1) if list(tokens[i : i + width]) == list(marker))
