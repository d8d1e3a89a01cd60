"""Files that are never half-written: written aside, flushed to the disk, and then moved into place."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from peft.utils import CONFIG_NAME


STAGE_PREFIX = ".saving-"
"""How the name of the hidden folder begins, which only a killed process leaves behind."""


@contextmanager
def staged(folder: Path, own: Iterable[str] = ()) -> Iterator[Path]:
    """Gives an empty folder to write in; when the context ends, its files take the places of those in `folder`.

    Whatever stops the process, each file is the earlier one or the new one. The configuration of an adapter moves last.
    If it changes, the earlier one goes first: weights never stand beside a configuration that is not theirs. A process that
    is killed between these moves leaves an adapter without a configuration, which PEFT refuses to load; what was still to
    be moved is then in a hidden folder.

    Args:
        folder: the folder, made if needed. Its other files stay.
        own: names of files, relative to the folder, that are removed from it where they are not written.

    Raises:
        NotADirectoryError: `folder` is a file.
        OSError: the folder cannot be written or the disk is full; `folder` is as it was.
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
            with suppress(OSError):  # some files have been moved
                folder.rmdir()
        if isinstance(error, OSError) and error.errno and error.filename is None:  # as of a full disk
            raise OSError(error.errno, error.strerror, str(folder)) from error
        raise


def _move(stage: Path, folder: Path, own: Iterable[str]) -> None:
    written = {Path(root): (folder / Path(root).relative_to(stage), names) for root, _, names in os.walk(stage)}
    for source, (place, names) in written.items():
        place.mkdir(exist_ok=True)
        for name in names:
            _flush(source / name)
            if (place / name).is_dir():
                raise IsADirectoryError(f"{place / name} is a folder in the place of a file that is to be written.")
    for name in own:
        if not (stage / name).exists():
            (folder / name).unlink(missing_ok=True)
    for source, (place, names) in written.items():
        config = place / CONFIG_NAME
        if {CONFIG_NAME} < set(names) and config.exists() and _differ(config, source / CONFIG_NAME):
            config.unlink()
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):
            os.replace(source / name, place / name)
        with suppress(OSError):  # not every file system can flush a folder
            _flush(place)


def _differ(file: Path, other: Path) -> bool:
    return file.read_bytes() != other.read_bytes()


def _flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
