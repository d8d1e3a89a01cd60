"""Gates: factors on the LoRA output of each module, which scores set and differentiate."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F

from .candidates import lora_factors


InitialFactors = tuple[torch.Tensor, torch.Tensor]
"""The (A, B) that an initialisation such as PiSSA's subtracted from the base weight, (r, in) and (out, r)."""

DeltaObserver = Callable[[str, torch.Tensor], None]
"""A function of a module's name and its LoRA output ΔW_m x, of shape (..., out)."""


class Gates:
    """The gates g ∈ R^M of one adapter's modules: module m computes y = W_m x + g_m · ΔW_m x.

    At g = 1 the model is the trained one; at g_m = 0 module m is as if pruned. For plain LoRA the gate multiplies the
    factor α/r, which PEFT stores in `layer.scaling`, and therefore works for all kinds of LoRA layers, including
    quantised ones. Otherwise (DoRA and other variants, initialisations that change the base weight) the gate replaces
    the layer's variant.

    Attributes:
        layers: the LoRA layers by module name.
        names: these names, in the order of the gates.
        adapter_name: the adapter whose LoRA is gated.
        initial: for modules whose initialisation changed the base weight, the factors that were subtracted from it.
    """

    def __init__(
        self, layers: Mapping[str, LoraLayer], adapter_name: str, initial: Mapping[str, InitialFactors]
    ) -> None:
        self.names = list(layers)
        self._layers = list(layers.values())
        self.layers = dict(layers)
        self.adapter_name = adapter_name
        self.initial = initial
        self._scalings = [layer.scaling[adapter_name] for layer in self._layers]
        self._variants: dict[int, _GatedVariant] = {}
        for index, (name, layer) in enumerate(layers.items()):
            variant = layer.lora_variant.get(adapter_name)
            if variant is not None or name in initial:
                self._variants[index] = _GatedVariant(variant, initial.get(name))

    def __len__(self) -> int:
        return len(self.names)

    def set(self, values: torch.Tensor) -> None:
        """Sets all gates.

        Args:
            values: shape (M,), in the order of `names`. If they require gradients, the loss is differentiable in them.
        """
        for index, (layer, scaling, value) in enumerate(
            zip(self._layers, self._scalings, values.unbind(), strict=True)
        ):
            if index in self._variants:
                self._variants[index].gate = value
            else:
                device = lora_factors(layer, self.adapter_name)[1].device
                layer.scaling[self.adapter_name] = scaling * (value if device.type == "meta" else value.to(device))

    @contextmanager
    def observed(self, observe: DeltaObserver) -> Iterator[None]:
        """Passes every module's ΔW_m x to `observe` in each forward pass within the context, at g = 1."""
        hooks = []
        try:
            for index, (name, layer, scaling) in enumerate(zip(self.names, self._layers, self._scalings, strict=True)):
                if index in self._variants:
                    self._variants[index].observe = _bound(observe, name)
                else:
                    hook = _show_output(_bound(observe, name), scaling)
                    hooks.append(layer.lora_B[self.adapter_name].register_forward_hook(hook))
            yield
        finally:
            for handle in hooks:
                handle.remove()
            for variant in self._variants.values():
                variant.observe = None

    def _install(self) -> None:
        for index, variant in self._variants.items():
            self._layers[index].lora_variant[self.adapter_name] = variant  # type: ignore[assignment]

    def _restore(self) -> None:
        for layer, scaling in zip(self._layers, self._scalings, strict=True):
            layer.scaling[self.adapter_name] = scaling
        for index, variant in self._variants.items():
            if variant.inner is None:
                self._layers[index].lora_variant.pop(self.adapter_name, None)
            else:
                self._layers[index].lora_variant[self.adapter_name] = variant.inner


@contextmanager
def module_gates(
    layers: Mapping[str, LoraLayer], adapter_name: str, initial: Mapping[str, InitialFactors]
) -> Iterator[Gates]:
    """Gates every module within the context. The layers are always restored afterwards.

    Args:
        layers: the LoRA layers by module name.
        adapter_name: the adapter whose LoRA is gated.
        initial: for modules whose initialisation changed the base weight, the factors that were subtracted from it.
    """
    gates = Gates(layers, adapter_name, initial)
    try:
        gates._install()
        yield gates
    finally:
        gates._restore()


class _GatedVariant:
    """Replaces a layer's LoRA variant and computes y + g · ΔW x from the variant's output.

    If the initialisation changed a base weight to W - s B₀A₀, the change by training is ΔW = s (BA - B₀A₀), and
    s B₀A₀ x is added back.
    """

    def __init__(self, inner: Any | None, initial: InitialFactors | None) -> None:
        self.inner = inner
        self.initial = initial
        self.gate: torch.Tensor | float = 1.0
        self.observe: Callable[[torch.Tensor], None] | None = None

    def forward(
        self, module: LoraLayer, *, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        if self.inner is not None:  # some variants add to their `result` in place
            adapted = self.inner.forward(module, active_adapter=active_adapter, x=x, result=result.clone(), **kwargs)
        else:
            lora_B, lora_A = module.lora_B[active_adapter], module.lora_A[active_adapter]
            adapted = result + lora_B(lora_A(x)) * module.scaling[active_adapter]
        if self.initial is not None:
            A, B = (factor.to(device=x.device, dtype=x.dtype) for factor in self.initial)
            result = result + F.linear(F.linear(x, A), B) * module.scaling[active_adapter]
        delta = adapted - result
        if self.observe is not None:
            self.observe(delta)
        gate = self.gate.to(delta.device) if isinstance(self.gate, torch.Tensor) else self.gate
        return result + gate * delta


def _bound(observe: DeltaObserver, name: str) -> Callable[[torch.Tensor], None]:
    return lambda delta: observe(name, delta)


def _show_output(show: Callable[[torch.Tensor], None], scaling: float) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        show(output * scaling)

    return hook
