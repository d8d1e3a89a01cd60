"""Imports of optional dependencies."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def from_extra(extra: str, need: str) -> Iterator[None]:
    """Context of an import that an extra of `peft-fanlora` makes possible.

    Args:
        extra: the extra.
        need: what needs it, the beginning of the error's message.

    Raises:
        ModuleNotFoundError: the import fails; the message says how to install it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{need}: pip install 'peft-fanlora[{extra}]'") from error
