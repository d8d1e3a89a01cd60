"""PARA that reads something else than its prompt where a block begins, or makes larger or smaller vectors of it."""

from collections.abc import Iterable, Iterator

import torch
from peft import PeftModel

from peft_fanlora.para.core.generator import VectorGenerator, pool

from .tasks import Batch, on


def feed_constant(model: PeftModel) -> None:
    """Lets every generator of a PARA model see ones in place of the hidden states.

    What is left is one learned vector a module, for all prompts alike; the difference to PARA is what reading the
    prompt is worth.
    """
    for generator in generators(model):
        generator.register_forward_pre_hook(lambda _, inputs: (torch.ones_like(inputs[0]), inputs[1]))


def feed_embeddings(model: PeftModel) -> None:
    """Lets every generator see the prompt as the first block sees it, the embeddings of its tokens."""
    first, *others = generators(model)
    seen: dict[str, torch.Tensor] = {}
    first.register_forward_pre_hook(lambda _, inputs: seen.update(embeddings=inputs[0]))
    for generator in others:
        generator.register_forward_pre_hook(lambda _, inputs: (seen["embeddings"], inputs[1]))


def scale_vectors(model: PeftModel, scale: float) -> None:
    """Lets every generator make 1 + scale (l - 1) in place of l."""
    for generator in generators(model):
        generator.register_forward_hook(
            lambda _, inputs, vectors: {name: 1 + scale * (vector - 1) for name, vector in vectors.items()}
        )


def centre(model: PeftModel, batches: Iterable[Batch]) -> None:
    """Lets every generator see the hidden states less their mean over the prompts of some batches.

    The pooled states of different prompts point nearly the same way, so that what they share is most of what a
    generator sees. Without it, what a prompt has of its own is scaled up by the normalisation.
    """
    for generator, states in pooled_states(model, batches).items():
        mean = states.mean(0)
        generator.register_forward_pre_hook(lambda _, inputs, mean=mean: (inputs[0] - mean, inputs[1]))


def standardise(model: PeftModel, batches: Iterable[Batch], contrast: float) -> None:
    """Lets every generator see m / |m| + contrast · (h - m) / s in place of the hidden states h.

    m and s are the mean and the standard deviation of the pooled states over the prompts of some batches, and |m| is the
    root mean square of m. Unlike `centre`, it leaves what the prompts share, from which a generator learns the vector
    that suits them all.
    """
    for generator, states in pooled_states(model, batches).items():
        mean, deviation = states.mean(0), states.std(0)
        shared = mean / mean.square().mean().sqrt()
        generator.register_forward_pre_hook(
            lambda _, inputs, mean=mean, deviation=deviation, shared=shared: (
                shared + contrast * (inputs[0] - mean) / deviation,
                inputs[1],
            )
        )


@torch.no_grad()
def pooled_states(model: PeftModel, batches: Iterable[Batch]) -> dict[VectorGenerator, torch.Tensor]:
    """Returns the mean of each prompt's hidden states, (prompts, d), as each generator sees them."""
    found: dict[VectorGenerator, list[torch.Tensor]] = {}
    handles = [
        generator.register_forward_pre_hook(
            lambda generator, inputs: found.setdefault(generator, []).append(pool(*inputs, "mean").flatten(0, 1))
        )
        for generator in generators(model)
    ]
    for batch in batches:
        model(**on(next(model.parameters()).device, batch))
    for handle in handles:
        handle.remove()
    return {generator: torch.cat(states) for generator, states in found.items()}


def generators(model: PeftModel) -> Iterator[VectorGenerator]:
    """Returns the generators of a PARA model, the first block's first."""
    return (module for module in model.modules() if isinstance(module, VectorGenerator))
