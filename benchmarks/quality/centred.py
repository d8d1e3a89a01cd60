"""PARA that reads what sets its prompt apart: the hidden states less their mean over training prompts.

The pooled states of different prompts point nearly the same way, so that what they share is most of what a generator
sees. Without it, what a prompt has of its own is scaled up by the normalisation.
"""

from collections.abc import Iterable

import torch
from peft import PeftModel

from peft_fanlora.para.generator import VectorGenerator, pool

from .tasks import Batch, on


@torch.no_grad()
def centre(model: PeftModel, batches: Iterable[Batch]) -> None:
    """Lets every generator see the hidden states less their mean over the prompts of some batches."""
    sums: dict[VectorGenerator, tuple[torch.Tensor, int]] = {}

    def add(generator: VectorGenerator, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        pooled = pool(*inputs, "mean").flatten(0, 1)
        total, count = sums.get(generator, (torch.zeros_like(pooled[0]), 0))
        sums[generator] = total + pooled.sum(0), count + len(pooled)

    generators = [module for module in model.modules() if isinstance(module, VectorGenerator)]
    handles = [generator.register_forward_pre_hook(add) for generator in generators]
    for batch in batches:
        model(**on(next(model.parameters()).device, batch))
    for handle in handles:
        handle.remove()
    for generator in generators:
        total, count = sums[generator]
        mean = total / count
        generator.register_forward_pre_hook(lambda _, inputs, mean=mean: (inputs[0] - mean, inputs[1]))
