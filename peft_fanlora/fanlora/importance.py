"""Importance scores of LoRA modules, from a gated model and calibration batches.

g_m is the gate of module m and L(g) the calibration loss, the mean cross-entropy over the label tokens of all batches.
All scores weight each label token equally, so that padding and batch size have no effect. FanLoRA scores each module
with a new score [P], but the paper's formula is not known to us. The scores here are ours unless marked.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import nn

from .candidates import lora_factors
from .gated_loss import Batch, GatedLoss
from .gates import Gates


ScoreFunction = Callable[[Any, int], torch.Tensor]
"""A function of a `GatedLoss` (of `Gates` if the score needs no data) and K that returns a number per module."""

Method = str | ScoreFunction
"""A score by its name or as a function."""


@dataclass(frozen=True)
class Score:
    """A score of modules.

    Attributes:
        function: a function of the loss of one batch, as a function of the gates, and K, the number of points of an
            integral. Returns one number per module, shape (M,), summed over the batch's label tokens. A score without
            data gets the gates instead, and returns the final scores.
        equation: the score of module m.
        passes: the number of forward passes per batch, as a function of the number of modules and K.
        needs_data: whether it is computed from calibration batches.
        is_share: whether the scores are divided by their sum instead of by the number of label tokens.
    """

    function: ScoreFunction
    equation: str = ""
    passes: Callable[[int, int], int] = lambda num_modules, num_points: 1
    needs_data: bool = True
    is_share: bool = False

    @property
    def name(self) -> str:
        """The name for `score_modules(method=...)`."""
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def uses_points(self) -> bool:
        """Whether it depends on K, according to its number of passes."""
        return self.passes(1, 1) != self.passes(1, 2)


SCORES: dict[str, Score] = {}
"""All scores by name."""


def importance_score(
    equation: str,
    *,
    passes: Callable[[int, int], int] = Score.passes,
    needs_data: bool = True,
    is_share: bool = False,
) -> Callable[[ScoreFunction], ScoreFunction]:
    """Decorator that registers a score under its function's name, for `score_modules`, the callback and the CLI.

    Args:
        equation: the score of module m.
        passes: the number of forward passes per batch, as a function of the number of modules M and K; one by default.
        needs_data: whether it is computed from calibration batches.
        is_share: whether the scores are divided by their sum instead of by the number of label tokens.

    Raises:
        ValueError: another function is registered under that name.

    Examples:
        >>> @importance_score("L(0) - L(only m)", passes=lambda num_modules, num_points: num_modules + 1)
        ... def alone(loss: GatedLoss, num_points: int) -> torch.Tensor: ...
        >>> scores = model.score_modules(dataloader, method="alone")
    """

    def register(function: ScoreFunction) -> ScoreFunction:
        score = Score(function, equation, passes, needs_data, is_share)
        before = SCORES.get(score.name)
        if before is not None and before.function.__module__ != function.__module__:
            raise ValueError(
                f"There is already a score {score.name!r}, in {before.function.__module__}: choose another name."
            )
        SCORES[score.name] = score
        return function

    return register


def find_score(method: Method) -> Score:
    """Returns a score by its name or function. A function without the decorator makes one pass per batch.

    Raises:
        ValueError: there is no score of that name.
    """
    if callable(method):
        return next((score for score in SCORES.values() if score.function is method), Score(method))
    if method not in SCORES:
        raise ValueError(
            f"method={method!r} is unknown; use one of {', '.join(SCORES)}, or pass a function, see `importance_score`."
        )
    return SCORES[method]


@importance_score(
    "-(1/K) Σ_k ∂L/∂g_m at g = (k-½)/K · 1, the integrated gradient from no module to all",
    passes=lambda num_modules, num_points: num_points,
)
def path(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """Returns the integrated gradient of -L along g = α·1 for α from 0 to 1, by the midpoint rule with K points.

    S_m = -1/K Σ_k ∂L/∂g_m at g = (k - 1/2)/K · 1. This is the Aumann-Shapley value of module m. Up to the error of the
    rule, the scores add up to the gain by the adapter: Σ_m S_m = L(0) - L(1).
    """
    points = [(k + 0.5) / num_points for k in range(num_points)]
    return -torch.stack([loss.gradient(point) for point in points]).mean(dim=0)


@importance_score(
    "S(all) - S(all but m) + S(only m), S = -L", passes=lambda num_modules, num_points: 2 * num_modules + 1
)
def ablation(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """AB-LoRA, for modules instead of ranks: S_m = S(all) - S(all but m) + S(only m), S = -L [sister: ALoRA eq. 6]."""
    alone = torch.eye(len(loss.gates))
    with torch.no_grad():
        everything = loss(torch.ones(len(loss.gates))).double()
        scores = [loss(1 - only).double() - everything - loss(only).double() for only in alone]
    return torch.stack(scores).cpu()


@importance_score("-∂L/∂g_m at g = 1")
def sensitivity(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """Returns the first-order effect of closing a gate on the loss: S_m = -∂L/∂g_m at g = 1."""
    return -loss.gradient(1.0)


@importance_score("E‖ΔW_m x‖², divided by the sum over all modules", is_share=True)
def output_norm(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """Returns LoRA-drop's score: S_m = E‖ΔW_m x‖², normalised to sum 1 [S].

    The mean is over the tokens with a loss. A module that does not see one vector for each of them (in an encoder) is
    averaged over the attended tokens of each row, with rows weighted by their number of label tokens; a routed expert
    is averaged over the tokens that it sees.
    """
    masks = [mask for mask in (loss.label_mask, loss.batch.get("attention_mask")) if mask is not None]
    tokens_in_row = loss.label_mask.reshape(len(loss.label_mask), -1).sum(dim=1)
    scores = {name: torch.zeros((), dtype=torch.float64) for name in loss.gates.names}

    def observe(name: str, delta: torch.Tensor) -> None:
        squares = delta.float().square().sum(dim=-1)
        if squares.ndim == 2 and len(squares) == len(tokens_in_row):
            weights = next((mask for mask in masks if mask.shape == squares.shape), torch.ones_like(squares))
            row_means = (squares * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
            total = (row_means * tokens_in_row.to(row_means.device)).sum()
        else:
            total = squares.mean() * loss.num_tokens
        scores[name] += total.double().cpu()

    with torch.no_grad(), loss.gates.observed(observe):
        loss(torch.ones(len(loss.gates)))
    return torch.stack(list(scores.values()))


@importance_score("‖ΔW_m‖ in the Frobenius norm", passes=lambda num_modules, num_points: 0, needs_data=False)
def weight_norm(gates: Gates, num_points: int) -> torch.Tensor:
    """Returns S_m = ‖ΔW_m‖ in the Frobenius norm, from the factors alone: ‖BA‖² = Σ (BᵀB ∘ AAᵀ), r × r each."""
    norms = []
    for name, layer in gates.layers.items():
        linears = layer.lora_A[gates.adapter_name], layer.lora_B[gates.adapter_name]
        with align_module_device(linears[0]), align_module_device(linears[1]):  # loads offloaded weights
            A, B = (factor.detach().double().cpu() for factor in lora_factors(layer, gates.adapter_name))
        if name in gates.initial:
            A0, B0 = (factor.double().cpu() for factor in gates.initial[name])
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        norms.append(layer.scaling[gates.adapter_name] * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
    return torch.stack(norms)


def score_batches(
    model: nn.Module, gates: Gates, score: Score, batches: Iterable[Batch], num_points: int
) -> tuple[torch.Tensor, int]:
    """Returns the score of every module, shape (M,), in float64, and the number of label tokens it is averaged over.

    Args:
        model: the base model with its LoRA layers, in eval mode, without parameters that require gradients.
        gates: the gates of the modules to score, whose adapter must be the active one.
        score: the score.
        batches: dicts of the arguments of the model's forward, including labels.
        num_points: K of `path`.

    Raises:
        ValueError: there is no label token, a loss or a score is not finite, or the score has a wrong shape.
    """
    if not score.needs_data:
        return _checked(score.function(gates, num_points), score, gates, "for its weights"), 0
    total, num_tokens = torch.zeros(len(gates), dtype=torch.float64), 0
    for number, batch in enumerate(batches):
        loss = GatedLoss(model, gates, batch, number)
        if loss.num_tokens:
            total += _checked(score.function(loss, num_points), score, gates, f"on batch {number}")
            num_tokens += loss.num_tokens
    total, num_tokens = _sum_over_processes(total, num_tokens)
    if not num_tokens:
        raise ValueError(
            "The calibration data has no label tokens: the dataloader is empty, as a generator is after its first "
            "use, or all labels are -100. Pass batches with `labels`, for instance from "
            "DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    return total / (total.sum() if score.is_share else num_tokens), num_tokens


def _checked(scores: torch.Tensor, score: Score, gates: Gates, where: str) -> torch.Tensor:
    if scores.shape != (len(gates),):
        raise ValueError(
            f"The score {score.name!r} returned the shape {tuple(scores.shape)} for {len(gates)} modules: return one "
            "number per module."
        )
    if not scores.isfinite().all():
        name = list(gates.layers)[int((~scores.isfinite()).nonzero()[0])]
        raise ValueError(
            f"The score {score.name!r} of {name} is not finite {where}, so modules cannot be compared. Check that the "
            "adapter's weights are finite, and the dtype of the model: float16 may overflow where bfloat16 and float32 "
            "do not."
        )
    return scores.detach().to("cpu", torch.float64)


def _sum_over_processes(total: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
    """Sums the scores of all processes of a distributed run, each computed on its part of the batches.

    All processes get the sums of the first one, so that rounding cannot make them select different modules.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, num_tokens
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.cat([total, torch.tensor([num_tokens], dtype=total.dtype)]).to(device)
    torch.distributed.all_reduce(sums)
    torch.distributed.broadcast(sums, src=0)
    return sums[:-1].cpu(), int(sums[-1])
