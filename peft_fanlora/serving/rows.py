"""Determines which dimension of a layer's input holds the rows of the batch.

Most layers see (rows, tokens, features), but not all: in Longformer, LED and XLNet the tokens come first, experts see
some of the tokens in their own order, vision towers see images, and relative positions are shared by all rows. Shapes
cannot tell these cases apart, since the number of rows may equal any other size. Therefore a model is run on a few
dummy rows, and again on the same rows in reverse order: the dimension in which a layer's input is reversed holds the
rows.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .call import Arguments
from .sharding import is_sharded


logger = logging.get_logger(__name__)

_ROWS, _TOKENS = 3, 7  # of the dummy batch


class Place(NamedTuple):
    """The dimension of a layer's input that holds the rows of the batch.

    Attributes:
        dimension: 0 or 1. If 0, a row may have several adjacent entries.
        is_flat: whether the input is (rows · tokens, features).
    """

    dimension: int
    is_flat: bool = False


class RowPlaces:
    """The `Place` of the rows for each layer of a model."""

    def __init__(self) -> None:
        self._measured: weakref.WeakKeyDictionary[nn.Module, Place | None] = weakref.WeakKeyDictionary()
        self._tried: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._some_have_none = False  # a quick check, since it is read for each layer at each token
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # a copied model has different layers

    def measure(self, model: nn.Module, layers: Collection[nn.Module], inputs: Mapping[str, Any]) -> None:
        """Measures layers that were not measured before. Models that cannot run on dummy rows are skipped.

        Args:
            model: the adapted model, in a state in which no adapter treats rows differently by their index.
            layers: the layers.
            inputs: the arguments of the current call by name, as an example of inputs that are not text.
        """
        if torch.compiler.is_compiling():
            return
        with self._lock:
            new = [layer for layer in layers if layer not in self._tried]
            self._tried.update(new)
            if not new or is_sharded(model.parameters()):
                return  # neither FSDP nor DeepSpeed supports a call within a call
            try:
                self._measured.update(_measured(model, new, inputs))
                self._some_have_none = None in self._measured.values()
            except Exception as error:
                logger.debug("%s cannot run on dummy rows: %r", type(model).__name__, error)

    def is_rows_first(self, layer: nn.Module) -> bool:
        """Returns whether a layer is known to see (rows, …)."""
        return self._measured.get(layer) == Place(0)

    def has_none(self, layer: nn.Module) -> bool:
        """Returns whether a layer is known not to see the rows."""
        return self._some_have_none and self._measured.get(layer, Place(0)) is None

    def dimension(self, layer: nn.Module, shape: torch.Size, rows: int, tokens: int | None) -> int | None:
        """Returns the dimension of a layer's input that holds the rows; None if it cannot be determined.

        Args:
            layer: the layer.
            shape: the shape of its input.
            rows: the number of rows of the call.
            tokens: the number of tokens per row; None if unknown.
        """
        if layer not in self._measured:
            return _by_shape(shape, rows, tokens)
        place = self._measured[layer]
        if place is None:
            return None
        if place.dimension == 1:
            return 1 if len(shape) > 2 and shape[1] == rows else None
        fits = shape[0] % rows == 0 if place.is_flat or len(shape) > 2 else shape[0] == rows
        return 0 if fits else None


def _by_shape(shape: torch.Size, rows: int, tokens: int | None) -> int | None:
    """Returns the dimension of the rows if the shape is unambiguous."""
    if len(shape) < 3:
        return 0 if shape[0] in (rows, rows * (tokens or 1)) else None
    if shape[0] == rows and (shape[1] != rows or rows == 1):
        return 0
    return 1 if shape[1] == rows and shape[0] != rows and shape[0] >= (tokens or 1) else None


def _measured(model: nn.Module, layers: list[nn.Module], inputs: Mapping[str, Any]) -> dict[nn.Module, Place | None]:
    """Runs the model on dummy rows in order and in reverse, and compares the inputs of each layer."""
    batch = _made_up(model, inputs)
    with _undisturbed(model):
        seen, seen_in_reverse = (
            _inputs_of(layers, model, rows) for rows in (batch, {name: value.flip(0) for name, value in batch.items()})
        )
    names = {module: name for name, module in model.named_modules()}
    tokens = Arguments(model, batch).tokens
    places = {}
    for layer in layers:
        pairs = zip(seen[layer], seen_in_reverse[layer], strict=False)
        depth = containers(model, names[layer])
        found = {_place(ordered, reverse, tokens, depth) for ordered, reverse in pairs}
        is_certain = len(found) == 1 and len(seen[layer]) == len(seen_in_reverse[layer])
        places[layer] = found.pop() if is_certain else None
    return places


def _made_up(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Returns dummy rows for the model's main input, and for the decoder's if there is one."""
    generator = torch.Generator().manual_seed(0)
    parameters = inspect.signature(model.forward).parameters
    is_text = (
        isinstance(model, PreTrainedModel) and "input_ids" in parameters and model.main_input_name != "input_values"
    )
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    device = next((value.device for value in tensors.values()), next(model.parameters()).device)
    made = {}
    if is_text:
        made["input_ids"] = _made_up_ids(model, generator)
    else:
        main = getattr(model, "main_input_name", None)
        name = main if main in tensors else next(iter(tensors))
        example = tensors[name].cpu()
        shape = (_ROWS, *example.shape[1:])
        if example.is_floating_point():
            made[name] = torch.randn(shape, generator=generator).to(example.dtype)
        else:
            made[name] = example.flatten()[torch.randint(example.numel(), shape, generator=generator)]
    if isinstance(model, PreTrainedModel) and model.config.is_encoder_decoder and "decoder_input_ids" in parameters:
        made["decoder_input_ids"] = _made_up_ids(model, generator)
    if "global_attention_mask" in parameters:  # the layers for global tokens only run if there are such tokens
        made["global_attention_mask"] = torch.zeros(_ROWS, _TOKENS, dtype=torch.long)
        made["global_attention_mask"][:, 0] = 1
    return {name: value.to(device) for name, value in made.items()}


def _made_up_ids(model: Any, generator: torch.Generator) -> torch.Tensor:
    """Returns token ids without special tokens, except the end-of-sequence token that some classifiers look for."""
    config = model.config.get_text_config()
    special = {
        value
        for part in (model.config, config)
        for name, value in part.to_dict().items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    embeddings: Any = model.get_input_embeddings()
    ordinary = torch.tensor([token for token in range(len(embeddings.weight)) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (_ROWS, _TOKENS), generator=generator)]
    if isinstance(config.eos_token_id, int):
        ids[:, -1] = config.eos_token_id
    return ids


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Context with eval mode and no gradients. Training flags and random state are restored afterwards."""
    training = [module for module in model.modules() if module.training]
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices):
        try:
            for module in training:
                module.training = False
            yield
        finally:
            for module in training:
                module.training = True


def _inputs_of(
    layers: list[nn.Module], model: nn.Module, batch: Mapping[str, torch.Tensor]
) -> dict[nn.Module, list[torch.Tensor]]:
    """Returns the inputs of each layer in a call, ignoring calls of other threads."""
    seen: dict[nn.Module, list[torch.Tensor]] = {layer: [] for layer in layers}
    own = threading.get_ident()

    def look(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()), None)
        if threading.get_ident() == own and isinstance(x, torch.Tensor):
            seen[layer].append(x.detach() if x.is_floating_point() else x.unsqueeze(-1).float())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(look, with_kwargs=True).remove)
        model(**batch)
    return seen


def containers(model: nn.Module, name: str) -> int:
    """Returns the number of module lists that contain a module: one for blocks, two for experts within blocks."""
    parts = name.split(".")
    parents = (model.get_submodule(".".join(parts[:length])) for length in range(len(parts)))
    return sum(isinstance(parent, (nn.ModuleList, nn.ModuleDict)) for parent in parents)


def _place(ordered: torch.Tensor, reverse: torch.Tensor, tokens: int | None, depth: int) -> Place | None:
    """Returns the place of the rows in an input, given the same input for the rows in reverse."""
    if ordered.shape != reverse.shape or ordered.dim() < 2:
        return None
    if len(ordered) % _ROWS == 0:
        per_row = ordered.reshape(_ROWS, -1, *ordered.shape[1:])
        if _comes_out_as(ordered, per_row.flip(0).reshape(ordered.shape), reverse):
            if ordered.dim() > 2:
                return Place(0)
            # A flat list of tokens or rows may be a subset in its own order: always for an expert, and within a block
            # unless it has all tokens.
            is_flat = per_row.shape[1] == tokens
            return Place(0, is_flat) if depth < 1 or (is_flat and depth < 2) else None
    if ordered.dim() > 2 and ordered.shape[1] == _ROWS and _comes_out_as(ordered, ordered.flip(1), reverse):
        return Place(1)
    return None


def _comes_out_as(ordered: torch.Tensor, expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Returns whether the input for the reversed rows is as expected, and differs from that for the rows in order.

    Feature vectors are compared one by one, since some may be much longer than others, and rows may differ only in a
    small part of each. In low precision some tokens may be routed to other experts, which changes their vectors. In a
    list of tokens all must match, since it may be a subset.
    """
    rounding = max(torch.finfo(ordered.dtype).eps, 1e-5) * expected.float().norm(dim=-1)
    apart = (expected.float() - ordered.float()).norm(dim=-1)
    wrong = (expected.float() - found.float()).norm(dim=-1)
    right = (wrong <= 0.1 * apart + rounding).float().mean()
    return bool(right >= (1 if found.dim() < 3 else 0.75) and (apart > 4 * rounding).any())
