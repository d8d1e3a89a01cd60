"""Which slot of the tables each running request has."""

from __future__ import annotations

from collections.abc import Iterator


class Slots:
    """Hands out slots 1, 2, …; slot 0 belongs to the rows without vectors.

    Args:
        count: how many requests may run at the same time.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count, 0, -1))
        self._taken: dict[str, int] = {}

    def take(self, request: str) -> int:
        """Returns the slot of a request, a free one where it has none.

        Raises:
            RuntimeError: all slots are taken.
        """
        if request not in self._taken:
            if not self._free:
                raise RuntimeError(
                    f"{self.count} requests have vectors and none of their slots is free for {request!r}: vLLM runs more "
                    "requests than max_num_seqs, or no longer reports which have ended."
                )
            self._taken[request] = self._free.pop()
        return self._taken[request]

    def of(self, request: str) -> int:
        """Returns the slot of a request that has one.

        Raises:
            RuntimeError: the request has none, so that its prompt never passed.
        """
        if request not in self._taken:
            raise RuntimeError(f"The request {request!r} goes on after its prompt, but no vectors were made for it.")
        return self._taken[request]

    def release(self, request: str) -> int | None:
        """Frees the slot of a request and returns it; None where it has none."""
        slot = self._taken.pop(request, None)
        if slot is not None:
            self._free.append(slot)
        return slot

    def __len__(self) -> int:
        return len(self._taken)

    def __iter__(self) -> Iterator[str]:
        return iter(self._taken)
