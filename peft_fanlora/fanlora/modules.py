"""The names of FanLoRA's modules, the linear layers of the Transformer blocks: stack, layer and role."""

import re
from collections.abc import Iterable
from typing import NamedTuple


_BLOCK = re.compile(r"^(?P<stack>.*?)\.(?P<layer>\d+)\.(?P<role>.+)$")

_PACKED_GROUPS = (
    {"q_proj", "k_proj", "v_proj"},
    {"q", "k", "v"},
    {"query", "key", "value"},
    {"gate_proj", "up_proj"},
    {"wi_0", "wi_1"},
    {"w1", "w3"},
)
"""Projections of the same input that serving engines fuse into one matrix, by the last part of their names."""
_VLLM_NAMES = {"gate_proj+up_proj": "gate_up_proj", "k_proj+q_proj+v_proj": "qkv_proj"}
"""The names of packed layers in vLLM."""


class ModuleName(NamedTuple):
    """The name of a linear layer: its stack of blocks, its layer (the number of the block) and its role in the block.

    `model.layers.7.mlp.up_proj` is the role `mlp.up_proj` of layer 7 in the stack `model.layers`; an encoder-decoder
    model has two stacks. In a model without numbered blocks every linear layer is a role of layer 0 in the stack "".
    """

    stack: str
    layer: int
    role: str

    @classmethod
    def parse(cls, name: str) -> "ModuleName":
        """Parses a qualified module name; the first number in it is the layer."""
        match = _BLOCK.match(name)
        return cls(match["stack"], int(match["layer"]), match["role"]) if match else cls("", 0, name)

    @property
    def block(self) -> str:
        """The qualified name of the block, such as `model.layers.7`."""
        return f"{self.stack}.{self.layer}" if self.stack else ""

    @property
    def name(self) -> str:
        """The qualified name of the module in the model."""
        return f"{self.block}.{self.role}" if self.stack else self.role

    @property
    def place(self) -> tuple[str, str]:
        """What it has in common with the modules of its role in the other layers: the stack and the role."""
        return self.stack, self.role

    @property
    def packed_group(self) -> tuple[str, str]:
        """The key of a packed group within a block: the parent and the names of the members."""
        parent, _, leaf = self.role.rpartition(".")
        members = next((group for group in _PACKED_GROUPS if leaf in group), {leaf})
        return parent, "+".join(sorted(members))


def vllm_layers(names: Iterable[str]) -> list[str]:
    """Returns the names of the vLLM layers that contain the named modules, for `lora_target_modules`."""
    layers = set()
    for module in map(ModuleName.parse, names):
        parent, packed = module.packed_group
        layers.add(".".join(filter(None, (module.block, parent, _VLLM_NAMES.get(packed, packed)))))
    return sorted(layers)


def layers_by_role(modules: Iterable[ModuleName], *, with_stack: bool) -> dict[str, list[int]]:
    """Returns the layers of each role, the most frequent role first.

    Args:
        modules: the modules to group.
        with_stack: whether to list the stacks of a model separately, as in `encoder.block.*.layer.0.SelfAttention.q`.
    """
    layers: dict[str, list[int]] = {}
    for module in modules:
        role = f"{module.stack}.*.{module.role}" if with_stack else module.role
        layers.setdefault(role, []).append(module.layer)
    return dict(sorted(layers.items(), key=lambda item: -len(item[1])))


def ranges(numbers: Iterable[int]) -> str:
    """Formats 0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
