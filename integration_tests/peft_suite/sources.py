"""PEFT's own tests, from the source distribution of the PEFT that is installed."""

import shutil
import tarfile
import tempfile
from pathlib import Path

import peft
from assets import PIP_DOWNLOAD, Download, cache_folder


SHA256 = {"0.21.2": "b803ccfb3f3f316004d850284306687833a2235ea278fb56abc856203456142e"}
"""The source distributions whose tests were looked at; `deselected.toml` speaks of the newest one."""


def tests_folder() -> Path:
    """Returns the folder `tests` of the source distribution, which is downloaded and unpacked once.

    Raises:
        KeyError: no digest of the installed version's source distribution is known.
    """
    version = peft.__version__
    if version not in SHA256:
        raise KeyError(f"PEFT {version} is installed, but the suite knows the tests of {', '.join(SHA256)} alone.")
    folder = cache_folder() / f"peft-{version}-tests"
    if not folder.exists():
        command = (*PIP_DOWNLOAD, "--no-binary", "peft", f"peft=={version}")
        archive = Download(command, SHA256[version]).path(f"peft-{version}.tar.gz")
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch, tarfile.open(archive) as files:
            members = [file for file in files if file.name.startswith(f"peft-{version}/tests/")]
            files.extractall(scratch, members, filter="data")
            unpacked = Path(scratch, f"peft-{version}")
            (unpacked / "tests" / "__init__.py").touch()  # the tests import each other, relative to a package
            shutil.move(unpacked, folder)
    return folder / "tests"
