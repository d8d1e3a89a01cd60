"""The configuration of PARA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..registration import add_peft_type
from ..sharing.config import StoredConfig
from .activations import RATIONAL, is_activation
from .core.generator import POOLINGS


if TYPE_CHECKING:
    from .shapes import ParaFields


@dataclass
class ParaConfig(StoredConfig):
    """Configuration of prompt-aware representation adjustment (PARA, arXiv 2502.01033).

    In each Transformer block one small generator reads the hidden states of the prompt and computes the vectors
    l = 1 + up(act(down(pool(h)))), which scale the outputs of the target modules for the whole sequence [P, S].

    Args:
        r: the width of the generator's bottleneck, at least 1. The default 12 gives about 8.9M parameters on
            LLaMA-2-7B, the size that a secondary source reports [S]; the width itself is derived from it [ours].
        target_modules: the modules whose output is scaled: a list of names, a regular expression, or "all-linear".
            By default the query, value and up projections [S] of the architecture.
        exclude_modules: names, or a regular expression, of modules not to adapt.
        layers_to_transform: the index, or the indices, of the blocks to adapt. By default all blocks.
        layers_pattern: the name of the list of blocks, such as "layers", if it has an unusual one.
        pooling: how the hidden states of the prompt are pooled into one vector: "attention" (a learned query, the best
            in a sister paper's comparison [sister]), "mean", "max" or "last".
        activation: the name of an activation of transformers, or "rational" for the learned rational function of
            the sister papers [sister].
        prompt_end_token_ids: the token ids that end every prompt, such as those of "<|im_start|>assistant\\n".
            Required for training if the labels do not mark the prompt; `get_prompt_end_token_ids` derives them from a
            tokenizer's chat template.
        para_dropout: the dropout probability of the pooled vector, 0 <= p < 1.
        init_para_weights: whether to initialise the adapter as the identity, with `up` at zero. With False `up` is
            random, which is useful in tests.
        modules_to_save: names of modules that are trained and saved in full, such as a new classification head.
        trainable_token_indices: the ids of tokens whose embeddings are also trained and saved, such as those of new
            tokens; or a dict from the name of an embedding layer to such ids.

    Raises:
        ValueError: a field has a wrong type or an invalid value.
    """

    r: int = field(default=12, metadata={"help": "Width of the generator's bottleneck, at least 1; typically 8-64."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose output is scaled: names, a regular expression, or 'all-linear'. "
            "By default the query, value and up projections of the architecture."
        },
    )
    exclude_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Names, or a regular expression, of modules not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Index or indices of the blocks to adapt; needs target_modules as a list."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of blocks, such as 'layers'; needs layers_to_transform."}
    )
    pooling: str = field(
        default="attention",
        metadata={"help": f"How the prompt's hidden states are pooled: one of {', '.join(POOLINGS)}."},
    )
    activation: str = field(
        default="gelu",
        metadata={"help": "Name of a transformers activation, such as 'gelu' or 'silu', or 'rational'."},
    )
    prompt_end_token_ids: list[int] | None = field(
        default=None,
        metadata={"help": "Token ids that end every prompt, such as those of '<|im_start|>assistant\\n'."},
    )
    para_dropout: float = field(
        default=0.0, metadata={"help": "Dropout probability of the pooled vector, 0 <= p < 1; typically 0-0.1."}
    )
    init_para_weights: bool = field(
        default=True, metadata={"help": "Whether to start as the identity; False gives random vectors, for tests."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved in full, such as a classification head."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None,
        metadata={
            "help": "Ids of tokens whose embeddings are also trained, such as new ones; or a dict by layer name."
        },
    )

    @classmethod
    def _shape(cls) -> type[ParaFields]:
        from .shapes import ParaFields

        return ParaFields

    def __post_init__(self) -> None:
        self.check_types()
        super().__post_init__()
        self.peft_type = add_peft_type("PARA")
        if isinstance(self.target_modules, (list, tuple)):
            self.target_modules = set(self.target_modules)
        if isinstance(self.exclude_modules, (list, tuple)):
            self.exclude_modules = set(self.exclude_modules)
        self._check_generator()
        self._check_targets()
        self._check_prompt_end()

    def _check_generator(self) -> None:
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ValueError(f"r={self.r!r} is not a width: pass a whole number of at least 1, such as r=12.")
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling={self.pooling!r} is unknown: choose one of {', '.join(map(repr, POOLINGS))}.")
        if not is_activation(self.activation):
            raise ValueError(
                f"activation={self.activation!r} is unknown: pass {RATIONAL!r} or a name from transformers' ACT2FN, "
                "such as 'gelu', 'silu' or 'relu'."
            )
        if not 0 <= self.para_dropout < 1:
            raise ValueError(f"para_dropout={self.para_dropout!r} is not a probability below 1: pass 0 <= p < 1.")

    def _check_targets(self) -> None:
        for name in ("layers_to_transform", "layers_pattern"):
            if isinstance(self.target_modules, str) and (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"`{name}` cannot be used when `target_modules` is a str. {name}={value!r} selects among named "
                    f"modules, but target_modules={self.target_modules!r} is a pattern: pass the names as a list, or "
                    "include the layers in the pattern."
                )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "When `layers_pattern` is specified, `layers_to_transform` must also be specified. "
                f"layers_pattern={self.layers_pattern!r} has no effect without it: also pass layers_to_transform=[…], "
                "or remove layers_pattern."
            )

    def _check_prompt_end(self) -> None:
        ends = self.prompt_end_token_ids
        if ends is None:
            return
        if (
            isinstance(ends, str)
            or not isinstance(ends, Sequence)
            or not ends
            or any(not isinstance(token, int) or isinstance(token, bool) or token < 0 for token in ends)
        ):
            raise ValueError(
                f"prompt_end_token_ids={ends!r} is not a list of token ids: pass the ids of the text that ends every "
                "prompt, such as tokenizer.encode('<|im_start|>assistant\\n', add_special_tokens=False)."
            )
        self.prompt_end_token_ids = list(ends)
