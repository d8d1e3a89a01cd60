"""How much each LoRA module matters: five scores over a gated model and batches of calibration data.

g_m is the gate of module m and L(g) the calibration loss, the mean cross-entropy over the label tokens of all batches.
Every score weights each label token equally, so that neither padding nor the batch size changes it. That FanLoRA scores
each module and that its score is new is the paper's statement [P]; the paper's formula is not known to us. The scores
here are ours unless marked.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm.auto import tqdm

from .gates import Gates, InitialFactors, module_gates
from .modules import lora_factors


Method = Literal["path", "ablation", "sensitivity", "output_norm", "weight_norm"]
METHODS: tuple[Method, ...] = get_args(Method)

Batch = Mapping[str, Any]


class GatedLoss:
    """The loss of a gated model on one batch, as a function of the gates.

    Attributes:
        label_mask: where the batch has label tokens, see `label_mask`.
        num_tokens: how many these are.
    """

    def __init__(self, model: nn.Module, gates: Gates, batch: Batch, on_forward: Callable[[], Any]) -> None:
        self.model = model
        self.gates = gates
        self.batch = batch
        self.on_forward = on_forward
        self.label_mask = label_mask(model, batch)
        self.num_tokens = int(self.label_mask.sum())

    def __call__(self, values: torch.Tensor) -> torch.Tensor:
        """Returns the cross-entropy at gates g, summed over the batch's label tokens, in float32.

        Args:
            values: g, shape (M,).

        Raises:
            ValueError: the loss is infinite or not a number.
        """
        self.gates.set(values)
        loss = self.model(**self.batch).loss.float() * self.num_tokens
        if not torch.isfinite(loss):
            raise ValueError(
                f"The calibration loss is {loss.item()}, so no module can be scored. Check the labels and the dtype of "
                "the model: float16 overflows where bfloat16 and float32 do not."
            )
        self.on_forward()
        return loss

    def gradient(self, value: float) -> torch.Tensor:
        """Returns ∂L/∂g at g = value · 1, summed over the batch's label tokens, shape (M,), in float64 on the CPU."""
        values = torch.full((len(self.gates),), value, requires_grad=True)
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self(values), values)
        return gradient.double()


def path(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """The integrated gradient of -L along g = α·1 for α from 0 to 1, by the midpoint rule with K points.

    S_m = -1/K Σ_k ∂L/∂g_m at g = (k - 1/2)/K · 1. This is the Aumann-Shapley value of module m, and up to the error of
    the rule the scores add up to what the adapter gains: Σ_m S_m = L(0) - L(1).
    """
    points = [(k + 0.5) / num_points for k in range(num_points)]
    return -torch.stack([loss.gradient(point) for point in points]).mean(dim=0)


def ablation(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """AB-LoRA, lifted from ranks to modules: S_m = S(all) - S(all but m) + S(only m) with S = -L [sister: ALoRA eq. 6]."""
    alone = torch.eye(len(loss.gates))
    with torch.no_grad():
        everything = loss(torch.ones(len(loss.gates))).double()
        scores = [loss(1 - only).double() - everything - loss(only).double() for only in alone]
    return torch.stack(scores).cpu()


def sensitivity(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """The first order of what closing the gate costs: S_m = -∂L/∂g_m at g = 1."""
    return -loss.gradient(1.0)


def output_norm(loss: GatedLoss, num_points: int) -> torch.Tensor:
    """LoRA-drop: S_m = E‖ΔW_m x‖², normalised to the sum 1 [S].

    The mean is over the tokens whose loss counts. A module that does not see one vector for each of these (in an
    encoder) is averaged over the attended tokens of each row, and rows by their number of label tokens; a routed
    expert over the tokens that it sees.
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


def weight_norm(
    layers: Mapping[str, LoraLayer], adapter_name: str, initial: Mapping[str, InitialFactors]
) -> torch.Tensor:
    """S_m = ‖ΔW_m‖ in the Frobenius norm, from the factors alone: ‖BA‖² = Σ (BᵀB ∘ AAᵀ), r × r each."""
    norms = []
    for name, layer in layers.items():
        A, B = (factor.detach().double().cpu() for factor in lora_factors(layer, adapter_name))
        if name in initial:
            A0, B0 = (factor.double().cpu() for factor in initial[name])
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        norms.append(layer.scaling[adapter_name] * ((B.T @ B) * (A @ A.T)).sum().clamp(min=0).sqrt())
    return torch.stack(norms)


_SCORES: dict[str, Callable[[GatedLoss, int], torch.Tensor]] = {
    "path": path,
    "ablation": ablation,
    "sensitivity": sensitivity,
    "output_norm": output_norm,
}


def score(
    model: nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    batches: Iterable[Batch],
    *,
    method: Method,
    num_points: int,
    num_batches: int | None,
    initial: Mapping[str, InitialFactors],
    progress: bool,
) -> tuple[torch.Tensor, int]:
    """Scores every module on the calibration batches.

    Args:
        model: the base model with its LoRA layers, in eval mode, no parameter requiring a gradient.
        layers: the modules to score.
        adapter_name: the adapter whose LoRA is scored; it has to be the active one.
        batches: keyword arguments of the model's forward, labels included.
        method: which score.
        num_points: K of `path`.
        num_batches: how many batches `batches` has, None where that is not known.
        initial: see `gates.module_gates`.
        progress: whether to show a progress bar, which counts forward passes.

    Returns:
        The scores, shape (M,), in float64, and the number of label tokens that they were averaged over.

    Raises:
        ValueError: there is no label token, or a loss is not finite.
    """
    if method == "weight_norm":
        return weight_norm(layers, adapter_name, initial), 0
    forwards = {"path": num_points, "ablation": 2 * len(layers) + 1}.get(method, 1)
    total, num_tokens = torch.zeros(len(layers), dtype=torch.float64), 0
    steps = None if num_batches is None else num_batches * forwards
    with (
        module_gates(layers, adapter_name, initial) as gates,
        tqdm(total=steps, desc=f"Scoring {len(layers)} modules by {method}", disable=not progress) as bar,
    ):
        for batch in batches:
            loss = GatedLoss(model, gates, batch, bar.update)
            if loss.num_tokens:
                total += _SCORES[method](loss, num_points)
                num_tokens += loss.num_tokens
    total, num_tokens = _sum_over_processes(total, num_tokens)
    if not num_tokens:
        raise ValueError(
            "The calibration data has no label tokens: the dataloader is empty, as a generator is after its first use, or "
            "all labels are -100. Pass batches "
            "with `labels`, for instance from DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    return total / (total.sum() if method == "output_norm" else num_tokens), num_tokens


def label_mask(model: Any, batch: Batch) -> torch.Tensor:
    """Returns where in the batch the model's loss counts, as a bool tensor in the shape of the labels.

    A causal model predicts label t+1 at token t, so the mask is shifted to the tokens that predict.

    Raises:
        ValueError: the batch has no labels.
    """
    if batch.get("labels") is None:
        raise ValueError(
            f"The calibration batch has no `labels`, only {sorted(map(str, batch))}; scores are differences of the loss. "
            "Use the data collator of your trainer, or DataCollatorForLanguageModeling(tokenizer, mlm=False)."
        )
    counted = batch["labels"] != -100
    if hasattr(model, "can_generate") and model.can_generate() and not model.config.is_encoder_decoder:
        tokens = batch.get("input_ids")
        if counted.ndim < 2 or (tokens is not None and counted.shape[:2] != tokens.shape[:2]):
            shape = "" if tokens is None else f", but `input_ids` {tuple(tokens.shape)}"
            raise ValueError(
                f"`labels` of a calibration batch has the shape {tuple(counted.shape)}{shape}: a causal model needs one label "
                "for each token, -100 where none counts."
            )
        counted = torch.cat([counted[:, 1:], torch.zeros_like(counted[:, :1])], dim=1)
    return counted


def _sum_over_processes(total: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, int]:
    """Adds up what the processes of a distributed run have scored, each on its share of the batches.

    All processes get the first one's sums, so that no last bit makes them choose differently.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return total, num_tokens
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    sums = torch.cat([total, torch.tensor([num_tokens], dtype=total.dtype)]).to(device)
    torch.distributed.all_reduce(sums)
    torch.distributed.broadcast(sums, src=0)
    return sums[:-1].cpu(), int(sums[-1])
