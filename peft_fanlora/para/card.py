"""The part of a model card that describes a PARA adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..sharing import snippets
from ..sharing.card import Part


if TYPE_CHECKING:
    from ..sharing.saved import SavedAdapter
    from .config import ParaConfig


def adapter_part(saved: SavedAdapter[ParaConfig], base: snippets.BaseModel, location: str) -> Part:
    """Returns the part of a model card that describes an adapter.

    Args:
        saved: the saved adapter.
        base: its base model.
        location: its folder or Hub id, as used in the card's code.
    """
    config = saved.config
    size = f" It has {saved.num_parameters:,} parameters." if saved.num_parameters else ""
    targets = config.target_modules
    named = f"`{targets}`" if isinstance(targets, str) else ", ".join(f"`{name}`" for name in sorted(targets or ()))
    pieces = [
        "PARA: one small generator in each Transformer block reads the prompt once and computes vectors that scale "
        f"the outputs of {named or 'the target modules'} for every following token.{size}",
        f"```python\n{snippets.use_adapter('PARA', base, location, saved.subfolder)}\n```",
        "It requires `pip install peft-fanlora`; without importing it PEFT raises `KeyError: 'PARA'`. "
        "`peft-fanlora run` starts other programs that load adapters with PEFT. Since the vectors depend on the "
        "prompt, the adapter cannot be merged into the weights or exported as plain LoRA.",
        "### Generator",
        "\n".join(
            [
                "| width r | pooling | activation | layers |",
                "|---:|---|---|---|",
                f"| {config.r} | {config.pooling} | {config.activation} | "
                f"{'all' if config.layers_to_transform is None else config.layers_to_transform} |",
            ]
        ),
        "### How the prompt is found",
        _prompt_end(config),
        "The vector generator in each layer that responds to the prompt is PARA's "
        "([Liu et al., EMNLP 2024](https://arxiv.org/abs/2502.01033)); the rules about where a prompt ends are those "
        "of `peft_fanlora`.",
    ]
    return Part(f"adapter {saved.name}", "PARA adapter", "\n\n".join(pieces), ("para", "peft-fanlora"))


def _prompt_end(config: ParaConfig) -> str:
    if config.task_type == "SEQ_2_SEQ_LM":
        return "The prompt is the encoder's whole input."
    if config.task_type not in (None, "CAUSAL_LM"):
        return "The prompt is the whole input."
    rules = ["if the call passes a `prompt_mask`, the tokens that it marks;"]
    if config.prompt_end_token_ids:
        rules.append(
            "else everything up to and including the first match of the token ids "
            f"`{list(config.prompt_end_token_ids)}` (`prompt_end_token_ids`);"
        )
    rules.append("else, with labels, the leading run of tokens whose label is -100;")
    rules.append("else, in inference, the input of `generate`, or of the call that fills the KV cache.")
    return "\n".join(f"{number}. {rule}" for number, rule in enumerate(rules, 1))
