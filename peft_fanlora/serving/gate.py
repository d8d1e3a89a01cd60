"""Prevents calls of a model and changes of its adapters from overlapping, across threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any


class CallGate:
    """A lock that lets either calls of a model or one change of it run at a time.

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
        return type(self), (self._after_change,)  # running calls are not copied

    @property
    def is_passed(self) -> bool:
        """Whether the current thread is inside a call."""
        return self._own.calls > 0

    @contextmanager
    def passed(self) -> Iterator[None]:
        """Context of a call. Calls may overlap, and a thread that makes a change may call the model itself."""
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
    def alone(self) -> Iterator[bool]:
        """Context in which no call of another thread is running, or may begin; gives False if one is running."""
        with ExitStack() as lock:
            lock.enter_context(self._condition)
            own = int(self._own.calls > 0 and not self._own.changes)
            is_alone = self._calls == own
            if not is_alone:
                lock.close()
            yield is_alone

    @contextmanager
    def closed(self) -> Iterator[None]:
        """Context of a change. It waits for running calls, and blocks new calls of other threads.

        Raises:
            RuntimeError: the current thread is inside a call.
        """
        if self.is_passed:
            raise RuntimeError(
                "The model is in the middle of a call, during which adapters cannot be added, deleted or pruned: "
                "change them between calls."
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
