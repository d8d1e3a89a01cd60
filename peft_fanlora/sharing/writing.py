"""Writes files atomically: to a temporary folder first, flushed to disk, then moved into place."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME


STAGE_PREFIX = ".saving-"
"""The prefix of the temporary folder, which only remains if the process is killed."""


@contextmanager
def staged(folder: Path, own: Iterable[str] = ()) -> Iterator[Path]:
    """Provides an empty folder to write to, and moves its files into `folder` when the context ends.

    If the process stops at any time, each file is either the old or the new one. An adapter's configuration is moved
    last; if it changes, the old one is deleted first, so that weights are never combined with a configuration of other
    weights. A process that is killed in between leaves an adapter without a configuration, which PEFT refuses to load,
    and the remaining files in a hidden folder.

    Args:
        folder: the folder, created if needed. Its other files are kept.
        own: names of files, relative to the folder, that are deleted if they are not written.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the folder cannot be written or the disk is full; `folder` is unchanged.
    """
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file; pass the folder to write.")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(dir=folder, prefix=STAGE_PREFIX) as name:
            yield Path(name)
            _move(Path(name), folder, own)
    except BaseException as error:
        if is_new:
            with suppress(OSError):  # the folder is not empty if some files were moved
                folder.rmdir()
        if isinstance(error, OSError) and error.errno and error.filename is None:  # for example if the disk is full
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _move(stage: Path, folder: Path, own: Iterable[str]) -> None:
    written = {Path(root): (folder / Path(root).relative_to(stage), names) for root, _, names in os.walk(stage)}
    for source, (place, names) in written.items():
        place.mkdir(exist_ok=True)
        for name in names:
            _flush(source / name)
            if (place / name).is_dir():
                raise IsADirectoryError(f"{place / name} is a folder, but a file of this name must be written.")
    for name in own:
        if not (stage / name).exists():
            (folder / name).unlink(missing_ok=True)
    for source, (place, names) in written.items():
        config = place / CONFIG_NAME
        if {CONFIG_NAME} < set(names) and config.exists() and _differ(config, source / CONFIG_NAME):
            config.unlink()
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):
            os.replace(source / name, place / name)
        with suppress(OSError):  # some file systems cannot flush a folder
            _flush(place)


def _differ(file: Path, other: Path) -> bool:
    return file.read_bytes() != other.read_bytes()


def _flush(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
