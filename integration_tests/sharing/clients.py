"""Processes that talk to the loopback hub: `huggingface_hub` reads its address once, at import."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock


@contextmanager
def client(url: str, home: Path, *, offline: bool = False) -> Iterator[Callable[..., Any]]:
    """Runs functions in a process of its own, whose Hub is at `url`, where "me" is signed in.

    Args:
        url: the address of the hub.
        home: the folder for what is downloaded.
        offline: whether the process is told to stay away from the network.
    """
    environment = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": "my-token",
    }
    with mock.patch.dict(os.environ, environment):
        pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        pool.submit(os.getpid).result()  # started while the environment is set
    with pool:
        yield lambda function, *args, **kwargs: pool.submit(function, *args, **kwargs).result(timeout=300)
