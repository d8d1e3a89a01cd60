"""Assignment of running requests to slots of the tables."""

from __future__ import annotations

from collections.abc import Iterator


class Slots:
    """Assigns the slots 1 to `count` to requests. Slot 0 is reserved for requests without vectors.

    Args:
        count: maximum number of requests with a slot at the same time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))
        self._taken: dict[str, int] = {}

    def take(self, request: str) -> int:
        """Returns the slot of a request; assigns a free one if it has none.

        Raises:
            RuntimeError: no slot is free.
        """
        if request not in self._taken:
            if not self._free:
                raise RuntimeError(
                    f"No slot is free for request {request!r}: all {self.count} slots (max_num_seqs) are in use. "
                    "Either vLLM runs more requests than max_num_seqs, or it does not report finished requests: use "
                    "the tested version of vLLM, and report this."
                )
            self._taken[request] = self._free.pop()
        return self._taken[request]

    def of(self, request: str) -> int:
        """Returns the slot of a request.

        Raises:
            RuntimeError: the request has no slot, since its prompt was not computed in an earlier step.
        """
        if request not in self._taken:
            raise RuntimeError(
                f"Request {request!r} has no vectors, because the plugin did not see its prompt: use the tested "
                "version of vLLM, and report this."
            )
        return self._taken[request]

    def release(self, request: str) -> int | None:
        """Frees the slot of a request and returns it; None if it has none."""
        slot = self._taken.pop(request, None)
        if slot is not None:
            self._free.append(slot)
        return slot

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)
