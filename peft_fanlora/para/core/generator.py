"""The vector generator of a block: pool -> normalise -> down -> activation -> up.

The functions are pure; `VectorGenerator` holds their parameters. Everything is computed in float32, or in float64 for
a float64 model: a bfloat16 sum over a long prompt stops growing, and bfloat16 values near 1 have steps of 0.008.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str, query: torch.Tensor | None = None) -> torch.Tensor:
    """Pools the prompt's hidden states of each sequence into one vector.

    "attention" is p = Σ_t softmax_t(h_t·w / √d) h_t over the prompt's tokens t [sister; the √d is ours]; "mean", "max"
    and "last" are the mean, the maximum and the last of the prompt's tokens. Without prompt tokens the result is zero.

    Args:
        hidden: hidden states h, (batch, tokens, d).
        mask: which tokens are the prompt of which sequence, bool (batch, sequences, tokens). There is one sequence
            per row, except in packed batches.
        pooling: one of `POOLINGS`.
        query: w, (d,) or one per row, (batch, d), for "attention".

    Returns:
        (batch, sequences, d), at least float32.
    """
    # Tokens outside of all prompts may contain NaN, and 0 * NaN is not 0.
    hidden = _precise(hidden.masked_fill(~mask.any(1).unsqueeze(-1), 0))
    entry = POOLINGS[pooling]
    if entry.has_query and query is None:
        raise ValueError(f'pooling="{pooling}" needs a query.')
    pooled = entry.rule(hidden, mask, query) if entry.has_query else entry.rule(hidden, mask)
    return pooled.to(hidden.dtype) @ hidden if entry.is_weighted else pooled


def _precise(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _attention(hidden: torch.Tensor, mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    scores = (hidden @ query.to(hidden.dtype).unsqueeze(-1)).mT * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return weights * mask


def _mean(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return mask / mask.sum(-1, keepdim=True).clamp(min=1)


def _max(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    lowest = torch.finfo(hidden.dtype).min
    pooled = [
        hidden.masked_fill(~sequence.unsqueeze(-1), lowest).amax(1) * sequence.any(1, keepdim=True)
        for sequence in mask.unbind(1)
    ]
    return torch.stack(pooled, 1)


def _last(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(mask.shape[-1], device=mask.device)
    last = (positions * mask).amax(-1, keepdim=True)
    return ((positions == last) & mask).float()


class Pooling(NamedTuple):
    """A pooling of the prompt's hidden states.

    Attributes:
        rule: a function of the hidden states (batch, tokens, d), the mask (batch, sequences, tokens) and the query. It
            returns token weights, (batch, sequences, tokens), and must return zeros for a sequence without prompt.
        is_weighted: whether the rule returns weights; otherwise it returns the pooled vectors, (batch, sequences, d).
        has_query: whether the generator has a query w, (d,), which the rule takes as its third argument.
    """

    rule: Callable[..., torch.Tensor]
    is_weighted: bool = True
    has_query: bool = False


POOLINGS: dict[str, Pooling] = {
    "attention": Pooling(_attention, has_query=True),
    "mean": Pooling(_mean),
    "max": Pooling(_max, is_weighted=False),
    "last": Pooling(_last),
}
"""All poolings by the name that `ParaConfig` takes."""


def rms_normalise(x: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Returns x / sqrt(mean(x²) + eps) over the last dimension; zeros stay zeros [ours].

    The scale of hidden states differs greatly between blocks and models, so that without normalisation no single
    learning rate suits all generators. It has no parameters.
    """
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def rational(x: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Returns Σ_{j=0..6} a_j x^j / (1 + |Σ_{i=1..5} b_i x^i|) [sister].

    `x` is first clamped to ±`RationalActivation.BOUND` [ours]: the powers of larger values overflow, in the gradients
    before the values.

    Args:
        x: any shape.
        numerator: a, (7,) or (…, 7), where … broadcasts with the shape of x.
        denominator: b, (5,) or (…, 5).
    """
    x = x.clamp(-RationalActivation.BOUND, RationalActivation.BOUND)
    above = torch.zeros_like(x)
    for coefficient in reversed(numerator.unbind(-1)):
        above = above * x + coefficient
    below = torch.zeros_like(x)
    for coefficient in reversed(denominator.unbind(-1)):
        below = (below + coefficient) * x
    return above / (1 + below.abs())


class RationalActivation(nn.Module):
    """A learned rational function of degrees 6 and 5, initialised to approximate GELU [sister].

    The initial coefficients are ours: within 0.005 of GELU on [-10, 10].

    Attributes:
        BOUND: the largest magnitude of an argument.
    """

    BOUND = 10.0
    GELU_NUMERATOR = (-0.0048501, 0.5000012, 0.4254936, 0.1355543, 0.0203106, 0.0014371, 3.85e-05)
    GELU_DENOMINATOR = (3.31e-05, 0.2710838, 6.7e-06, 0.0028734, 0.0)

    def __init__(self) -> None:
        super().__init__()
        self.numerator = nn.Parameter(torch.tensor(self.GELU_NUMERATOR))
        self.denominator = nn.Parameter(torch.tensor(self.GELU_DENOMINATOR))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rational(x, self.numerator.to(x.dtype), self.denominator.to(x.dtype))


class VectorGenerator(nn.Module):
    """Computes a block's vectors from its prompt: l_m = 1 + U_m act(D norm(pool(h)) / √d), for each target m.

    D, (r, d), is shared by the targets of the block, and each target has its own U_m, (outputs, r); there are no
    biases. With one generator per block this is 32·12·(4096 + 4096 + 4096 + 11008) = 8,945,664 parameters on
    LLaMA-2-7B at r=12 [ours, to match the 8.9M of S]; attention pooling adds its query, d per block. U_m is
    initialised to zero, so that l = 1, and D with standard deviation 1 [ours].

    The factors 1/√d keep the bottleneck near unit scale and slow down the training of D and w [ours]. Adam moves each
    parameter by about the learning rate, whatever its gradient: without them a step of 0.003 could move a sum of d =
    576 such products by more than 1, while U_m, with r = 12 of them, moves l by 0.02.

    Args:
        in_features: d, the width of the block's hidden states.
        r: the width of the bottleneck.
        pooling: one of `POOLINGS`.
        activation: act, an elementwise function such as `nn.GELU()` or `RationalActivation()`.
        dropout: the dropout probability of the pooled vector.
        prompt_end: the token ids that end the prompts of this adapter, if known.
    """

    def __init__(
        self,
        in_features: int,
        r: int,
        pooling: str,
        activation: nn.Module,
        dropout: float = 0.0,
        prompt_end: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.r = r
        self.pooling = pooling
        self.prompt_end = prompt_end
        self.down = nn.Parameter(torch.randn(r, in_features))
        self.targets: list[str] = []
        self.query = nn.Parameter(torch.zeros(in_features)) if POOLINGS[pooling].has_query else None
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def add_target(self, name: str, num_outputs: int, identity: bool = True) -> None:
        """Adds the up-projection of another target of the block.

        Args:
            name: the target's name, without dots.
            num_outputs: how many of the target's outputs are scaled.
            identity: whether to initialise it to zero, so that the vector is 1; otherwise random, for tests.
        """
        weight = torch.zeros(num_outputs, self.r) if identity else torch.randn(num_outputs, self.r) * 0.1
        # Registered on this module directly, since offloaded weights are loaded for the module whose forward runs.
        self.register_parameter(f"up_{name}", nn.Parameter(weight))
        self.targets.append(name)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the vector l of each target.

        Args:
            hidden: the block's hidden states, (batch, tokens, d).
            mask: which tokens are the prompt of which sequence, bool (batch, sequences, tokens).

        Returns:
            Target name -> (batch, sequences, outputs), at least float32.
        """
        return self._vectors(hidden, mask, dict(self.named_parameters()), self.activation)

    @property
    def stack_key(self) -> tuple[Any, ...]:
        """A key; `batched` can compute generators with the same key together."""
        is_hooked = "forward" in vars(self) or self._forward_pre_hooks or self._forward_hooks
        is_learned = (
            not isinstance(self.activation, RationalActivation)
            and next(self.activation.parameters(), None) is not None
        )
        if is_hooked or is_learned:
            # A hook, such as the one that loads offloaded weights, needs this module's own forward, and so does an
            # activation with parameters, such as PReLU, which `batched` cannot stack.
            return (self,)
        outputs = tuple((name, len(getattr(self, f"up_{name}"))) for name in self.targets)
        shape = self.in_features, self.r, self.down.dtype, self.down.device
        return self.pooling, type(self.activation), self.dropout.p, self.prompt_end, shape, outputs

    @staticmethod
    def batched(
        generators: Sequence[VectorGenerator], hidden: torch.Tensor, mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Returns the same as `forward`, for rows with different generators.

        The parameters are stacked, so that as many operations are run as for one generator.

        Args:
            generators: the generator of each row, all with the same `stack_key`.
            hidden: the block's hidden states, (batch, tokens, d).
            mask: which tokens are the prompt of which sequence, bool (batch, sequences, tokens).
        """
        first, *others = different = list(dict.fromkeys(generators))
        if not others:
            return first(hidden, mask)
        slots = torch.tensor([different.index(generator) for generator in generators], device=hidden.device)
        stacked = {
            name: torch.stack([generator.get_parameter(name) for generator in different])[slots]
            for name, _ in first.named_parameters()
        }
        activation: Any = first.activation
        if isinstance(activation, RationalActivation):
            numerator, denominator = (
                stacked[f"activation.{name}"][:, None, None] for name in ("numerator", "denominator")
            )
            activation = partial(rational, numerator=numerator, denominator=denominator)
        return first._vectors(hidden, mask, stacked, activation)

    def _vectors(
        self, hidden: torch.Tensor, mask: torch.Tensor, weights: dict[str, torch.Tensor], activation: Any
    ) -> dict[str, torch.Tensor]:
        """Returns the vectors for the given weights, each shared by all rows or stacked per row."""
        with torch.autocast(device_type=hidden.device.type, enabled=False):
            pooled = self.dropout(rms_normalise(pool(hidden, mask, self.pooling, weights.get("query"))))
            code = (pooled @ weights["down"].to(pooled.dtype).mT) * self.in_features**-0.5
            code = activation(code).to(pooled.dtype)
            ups = {name: weights[f"up_{name}"].to(pooled.dtype) for name in self.targets}
            return {name: 1 + code @ up.mT for name, up in ups.items()}
