"""Keeps calls of a model and changes of its adapters apart, whichever threads they come from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class CallGate:
    """Keeps calls of a model and changes of it apart.

    Args:
        after_change: called at the end of each change, before the next call.
    """

    def __init__(self, after_change: Callable[[], None] = lambda: None) -> None:
        self._after_change = after_change
        self._calls = 0
        self._closers = 0
        self._condition = threading.Condition()
        self._own = _Own()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._after_change,)  # calls of a model are not calls of its copy

    @property
    def is_passed(self) -> bool:
        """Whether this thread is inside of a call."""
        return self._own.calls > 0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """For the length of a call; calls do not keep each other out, nor does a change that the thread itself makes."""
        is_outermost = not (self._own.calls or self._own.changes)
        if is_outermost:
            with self._condition:
                self._condition.wait_for(lambda: not self._closers)
                self._calls += 1
        self._own.calls += 1
        try:
            yield
        finally:
            self._own.calls -= 1
            if is_outermost:
                with self._condition:
                    self._calls -= 1
                    self._condition.notify_all()

    @contextmanager
    def closed(self) -> Iterator[None]:
        """For the length of a change: begins when no call is running, and lets none begin but the thread's own.

        Raises:
            RuntimeError: this thread is inside of a call.
        """
        if self.is_passed:
            raise RuntimeError(
                "The model is in the middle of a call, during which adapters cannot come, go or be pruned: change them "
                "between calls."
            )
        with self._condition:
            self._closers += 1
            self._own.changes += 1
            try:
                self._condition.wait_for(lambda: self._calls == 0)
                yield
            finally:
                self._after_change()
                self._own.changes -= 1
                self._closers -= 1
                self._condition.notify_all()


class _Own(threading.local):
    calls = 0
    changes = 0
