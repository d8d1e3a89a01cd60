"""Continuous batching: another thread decodes the tokens of many requests together, packed in one row.

transformers always enters it through a model's `init_continuous_batching`: from `generate_batch`,
`continuous_batching_context_manager`, `generate(cache_implementation="paged")`, and TRL's
`use_transformers_continuous_batching`. The returned manager tells the tuner at each step which request each token
belongs to. It disables compilation, CUDA graphs, and prefix sharing between requests, whose adapters or prompts may
differ.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from transformers.generation.continuous_batching import ContinuousBatchingManager

from .whole_prompts import keep_prompts_whole


ENTRIES = ("generate_batch", "init_continuous_batching")
FIX = (
    "use `generate` without cache_implementation='paged', or in TRL's trainers "
    "use_transformers_continuous_batching=False"
)


@dataclass(frozen=True)
class Request:
    """A request in one step.

    Attributes:
        identifier: its id.
        num_tokens: how many of its tokens the step computes.
        begins: whether these are its prompt, so that none of its tokens are in the cache yet.
        adapter: the adapter that it names; None if it uses the active adapters.
    """

    identifier: str
    num_tokens: int
    begins: bool
    adapter: str | None


class ContinuousBatching:
    """A model's methods for continuous batching, set on the instance in place of those of its class.

    Args:
        tuner: the model's tuner.
    """

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner
        self.current = _Current()

    def install(self) -> None:
        """Sets the methods on the tuner's model, if it supports continuous batching and does not have them yet."""
        model = self.tuner.model
        own = getattr(vars(model).get(ENTRIES[-1]), "__self__", None)
        if hasattr(model, ENTRIES[-1]) and not isinstance(own, ContinuousBatching):
            for name in ENTRIES:
                setattr(model, name, getattr(self, name))

    def remove(self) -> None:
        """Restores the methods of the model's class."""
        for name in ENTRIES:
            vars(self.tuner.model).pop(name, None)

    def generate_batch(
        self, inputs: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Any:
        """Generates like `transformers.ContinuousMixin.generate_batch`, with an adapter for each prompt.

        Args:
            inputs: the prompts, lists of token ids.
            args: further arguments of transformers' method.
            adapter_names: the adapter of each prompt; None for the active ones.
            kwargs: further arguments of transformers' method.

        Raises:
            ValueError: there is not one name per prompt, or the model cannot separate the requests.
        """
        names = self.tuner.names_of_thread() if adapter_names is None else self.tuner.row_names(adapter_names)
        if names is not None and len(names) != len(inputs):
            raise ValueError(
                f"adapter_names has {len(names)} names, but there are {len(inputs)} prompts: pass one name per prompt."
            )
        mask = kwargs.get("attention_mask")
        ignored = "prompt_mask" if "prompt_mask" in kwargs else "attention_mask"
        if self.tuner.computing_adapters() and ("prompt_mask" in kwargs or not (mask is None or mask.all())):
            raise ValueError(
                f"Continuous batching ignores the {ignored}: pass prompts of different lengths to generate_batch as "
                "lists of their own tokens, and set prompt_end_token_ids in the config to tell PARA where they end."
            )
        if names is not None:
            self.tuner.find_rows()  # before the attention implementation is replaced
        before, self.current.names = self.current.names, names
        self.current.manager = None
        try:
            results = type(self.tuner.model).generate_batch(self.tuner.model, inputs, *args, **kwargs)
        finally:
            self.current.names, manager, self.current.manager = before, self.current.manager, None
        if manager is not None and manager.error is not None:
            raise manager.error  # transformers only logs the error and returns partial results
        return results

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> ContinuousBatchingManager:
        """Returns a manager like `transformers.ContinuousMixin.init_continuous_batching`.

        Raises:
            ValueError: the model cannot separate the requests.
        """
        model, names = self.tuner.model, self.current.names
        if names is None and self.tuner.names_of_thread() is not None:
            raise ValueError(
                f"adapter_names was set outside of `generate_batch`: use generate_batch(adapter_names=...), or {FIX}."
            )
        adapters = self.tuner.computing_adapters()
        by_request = bool(adapters) and (names is not None or self.tuner.makes_vectors)
        if adapters:
            self._check(adapters, names, by_request)
        session = (adapters, names is not None)
        persistent = getattr(model, "_cached_continuous_batching_manager", None)
        if persistent is not None and getattr(persistent, "session", None) != session:
            model.destroy_cached_continuous_batching_manager()
        manager: Any = type(model).init_continuous_batching(model, *args, **kwargs)
        if not isinstance(manager, _Manager):
            manager.__class__ = _Manager
            manager.begin(self, session, by_request)
        elif not manager.is_running():
            manager.begin_again()
        self.current.manager = manager
        return manager

    def _check(self, adapters: Sequence[str], names: Sequence[str] | None, by_request: bool) -> None:
        """Raises if the model does not separate requests, or a layer lacks information about them."""
        model, configs = self.tuner.model, self.tuner.peft_config
        concerned = [configs[name] for name in {*adapters, *(names or ())} if name in configs]
        if not getattr(model, "_supports_attention_backend", True):
            reason = f"The attention of {type(model).__name__} does not read a paged cache"
        elif any(getattr(config, "alora_invocation_tokens", None) for config in concerned):
            reason = "Activated LoRA looks for its invocation tokens in the prompts of `generate`"
        elif by_request and isinstance(model.get_output_embeddings(), BaseTunerLayer):
            reason = "The model's head is adapted, and sees only some of the tokens"
        elif names is not None and self.tuner.has_modules_saved_whole:
            reason = "The adapters have modules_to_save, of which a call can use only one"
        else:
            return
        raise ValueError(f"{reason}, which continuous batching cannot serve: {FIX}.")


class _Current(threading.local):
    names: tuple[str, ...] | None = None
    manager: _Manager | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()  # the state of running calls is not copied


class _Prompt(list[int]):
    """A prompt that names its adapter."""

    def __init__(self, ids: Sequence[int], adapter: str) -> None:
        super().__init__(ids)
        self.adapter = adapter


class _Manager(ContinuousBatchingManager):
    """A manager that tells the tuner which requests a step computes. Managers of transformers are converted to it.

    Attributes:
        entries: the object that created it.
        session: the active adapters, and whether requests name theirs.
        by_request: whether the tuner needs to know the requests.
        num_copies: how many sequences are generated for each prompt.
        names: the adapter of each request that names one.
        kept: the tuner's data for each request.
        error: the error of a failed step.
    """

    entries: ContinuousBatching
    session: tuple[tuple[str, ...], bool]
    by_request: bool
    num_copies: int
    names: dict[str, str]
    kept: dict[str, Any]
    error: Exception | None

    def begin(self, entries: ContinuousBatching, session: tuple[tuple[str, ...], bool], by_request: bool) -> None:
        """Initialises the state for the first session."""
        self.entries, self.session, self.by_request = entries, session, by_request
        self.names, self.kept, self.error = {}, {}, None
        if not by_request:
            return
        config: Any = self.continuous_batching_config
        config.allow_block_sharing = config.use_async_batching = self._use_prefix_sharing = False
        config.use_cuda_graph = (False, False)
        config.varlen_compile_config = config.decode_compile_config = None
        # transformers would split a prompt with several return sequences before its last token
        self.num_copies, self.num_return_sequences = self.num_return_sequences, 1

    def begin_again(self) -> None:
        """Clears the requests of the last session, and the prefix cache, which other weights may have filled."""
        self.names, self.kept, self.error = {}, {}, None
        if self.batch_processor is not None:
            self.batch_processor.cache.reset()

    def add_requests(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> list[str]:
        """Adds requests like transformers' method; within `generate_batch` each prompt keeps its adapter."""
        names = self.entries.current.names
        if names is not None:
            inputs = [_Prompt(ids, name) for ids, name in zip(inputs, names, strict=True)]
        return super().add_requests(inputs, *args, **kwargs)

    def add_request(
        self, input_ids: list[int], request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> str | None:
        """Adds a request like transformers' method; one with several return sequences becomes several requests."""
        if not self.by_request:
            return super().add_request(input_ids, request_id, *args, **kwargs)
        if self.session[1] and not (isinstance(input_ids, _Prompt) and request_id):
            raise ValueError("This manager's requests name their adapters: use generate_batch(adapter_names=...).")
        if isinstance(input_ids, _Prompt):
            self.names[str(request_id)] = input_ids.adapter
        request_id = super().add_request(input_ids, request_id, *args, **kwargs)
        for child in range(self.num_copies - 1):
            identifier = f"{request_id}__child#{child}"
            if isinstance(input_ids, _Prompt):
                self.names[identifier] = input_ids.adapter
            super().add_request(input_ids, identifier, *args, **kwargs)
        return request_id

    def _create_batch_processor(self) -> Any:
        processor = super()._create_batch_processor()
        if self.by_request and self.entries.tuner.makes_vectors:
            keep_prompts_whole(processor.scheduler, self._note)
        return processor

    def _generation_step(self) -> None:
        tuner, processor = self.entries.tuner, cast(Any, self.batch_processor)
        try:
            with tuner.call_gate.passed():
                if (adapters := tuner.computing_adapters()) != self.session[0]:
                    raise RuntimeError(
                        f"The adapters {list(self.session[0])} were active when this continuous batching started, but "
                        f"{list(adapters)} are active now: wait for its requests before switching adapters."
                    )
                step: AbstractContextManager[None] = nullcontext()
                if self.by_request:
                    pending = processor.scheduler.active_requests.keys() | processor.scheduler.waiting_requests.keys()
                    self.kept = {name: kept for name, kept in self.kept.items() if name in pending}
                    requests = [self._request(future) for future in processor.inputs_and_outputs.requests_in_batch]
                    step = tuner.decoding(requests, self.kept)
                with step:
                    super()._generation_step()
        except Exception as error:
            self._note(error)
            raise

    def _note(self, error: Exception) -> None:
        self.error = self.error or error

    def _request(self, future: Any) -> Request:
        state = future.state
        # `position_offset` already includes the step's tokens
        begins = state.position_offset == future.query_length and not state._true_initial_tokens
        return Request(state.request_id, future.query_length, begins, self.names.get(state.request_id))
