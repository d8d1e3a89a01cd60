"""Settings that all tests share."""

import gc
import os
import sys
from collections.abc import Iterator
from importlib.util import find_spec

import pytest


# Before torch is imported: tiny tensors gain nothing from threads, and no test may reach for the Hub.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["integration_tests.helpers.support_table"]


@pytest.fixture(autouse=True, scope="module")
def quick_collections() -> None:
    """Exempts what is imported by now from garbage collection, which would take up to half a second each time.

    Transformers, Accelerate and TRL collect garbage in many of their calls.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def quick_flushes() -> Iterator[None]:
    """Saved files are not flushed to the disk, which takes milliseconds each and shows only when a machine loses power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture
def often_switched_threads() -> Iterator[None]:
    """Lets Python switch between threads every ten microseconds, so that they meet in more places."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def exact_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps bitsandbytes from its fast path of CPUs with AVX512-BF16.

    There it packs 4-bit weights again in eval mode, computes in bfloat16, and unpacks them whenever the state dict is taken,
    which changes doubly quantised weights a little each time; no comparison to 1e-5 survives that.
    """
    if find_spec("bitsandbytes"):  # whose older versions have no such path
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False, raising=False)
