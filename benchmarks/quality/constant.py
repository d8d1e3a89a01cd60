"""PARA without its prompt: the same generators, with the same parameters, fed with a constant.

What is left is one learned vector a module, for all prompts alike; the difference to PARA is what reading the prompt
is worth.
"""

import torch
from peft import PeftModel

from peft_fanlora.para.generator import VectorGenerator


def feed_constant(model: PeftModel) -> None:
    """Lets every generator of a PARA model see ones in place of the hidden states."""
    for module in model.modules():
        if isinstance(module, VectorGenerator):
            module.register_forward_pre_hook(_ones)


def _ones(generator: VectorGenerator, inputs: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, mask = inputs
    return torch.ones_like(hidden), mask
