"""PARA with continuous batching, where one row holds the tokens of many requests.

Each request's vectors are made in the step that computes its prompt, from that prompt alone, and used in later steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from ..serving.call import Arguments
from ..serving.continuous_batching import Request
from .prompt import Inputs, causal_prompt
from .state import Call, EndsOf, Vectors


class PackedStep:
    """One step of continuous batching.

    Args:
        requests: the requests whose tokens are in the row, in order.
        kept: request id -> the vectors of requests whose prompts were computed earlier; `keep_vectors` adds new ones.
    """

    def __init__(self, requests: Sequence[Request], kept: dict[str, Vectors]) -> None:
        self.requests = requests
        self.kept = kept
        self.new = [index for index, request in enumerate(requests) if request.begins]
        self.vectors: Vectors | None = None
        self._identifiers = [request.identifier for request in requests]

    def open(self, arguments: Arguments, adapters: tuple[str, ...], ends_of: EndsOf, before: Any) -> Call:
        """Returns the step's call.

        Args:
            arguments: the arguments of the step's call.
            adapters: the active adapters, used by requests that name none.
            ends_of: returns the distinct `prompt_end` values of some adapters.
            before: the previous step, or None.
        """
        ids = arguments.named["input_ids"]
        device, lengths = ids.device, [request.num_tokens for request in self.requests]
        starts = [0, *accumulate(lengths)]
        call = Call(arguments, adapters, batch=1, tokens=starts[-1], from_cache=not self.new, step=self)
        if starts[-1] > len(lengths):
            segments = [index for index, length in enumerate(lengths) for _ in range(length)]
            call.segments = torch.tensor([segments], device=device)
        if self.new:
            # Each prompt becomes a padded row, whose padding is not attended.
            steps = torch.arange(max(lengths[index] for index in self.new), device=device)
            attended = steps < torch.tensor([lengths[index] for index in self.new], device=device).unsqueeze(1)
            first = torch.tensor([starts[index] for index in self.new], device=device).unsqueeze(1)
            self.places = torch.where(attended, first + steps, first)
            inputs = Inputs(attended, self._rows_of(ids.squeeze(0)))
            call.rows = tuple(name for index in self.new if (name := self.requests[index].adapter) is not None) or None
            call.adapters = tuple(dict.fromkeys(call.rows or adapters))
            call.prompts = {end: causal_prompt(inputs, end, False) for end in ends_of(call.adapters)}
        else:
            call.vectors = self._all_kept(before)
        self.vectors = call.vectors
        return call

    def prompts_in(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the hidden states of the new prompts, (prompts, tokens, d), taken from those of all tokens."""
        return self._rows_of(hidden.reshape(-1, hidden.shape[-1]))

    def _rows_of(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[self.places.to(tokens.device)]

    def with_kept(self, name: str, made: torch.Tensor | None) -> torch.Tensor | None:
        """Returns a layer's vectors for all requests, (1, requests, outputs), both new and stored."""
        made_for = {} if made is None else dict(zip(self.new, made.unbind(0), strict=True))
        parts = [
            made_for.get(index) if request.begins else self.kept[request.identifier].get(name)
            for index, request in enumerate(self.requests)
        ]
        some = next((part for part in parts if part is not None), None)
        if some is None:
            return None
        return torch.cat([torch.ones_like(some) if part is None else part for part in parts]).unsqueeze(0)

    def _all_kept(self, before: PackedStep | None) -> Vectors:
        """Returns the stored vectors of all requests, reused from the previous step if the requests are the same."""
        if before is not None and before.vectors is not None and before._identifiers == self._identifiers:
            return before.vectors
        names = dict.fromkeys(name for request in self.requests for name in self.kept[request.identifier])
        return {name: self.with_kept(name, None) for name in names}

    def keep_vectors(self) -> None:
        """Stores the vectors that the call made."""
        if self.vectors is None:
            return
        for index in self.new:
            self.kept[self.requests[index].identifier] = {
                name: None if vectors is None else vectors[0, index : index + 1].clone()
                for name, vectors in self.vectors.items()
            }
