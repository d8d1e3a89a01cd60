"""PARA with speculative decoding, tensor parallelism, compilation and the second model runner, in new processes.

All tokens equal those of transformers. Run by `make test-vllm`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration_tests.helpers.processes import environment
from integration_tests.vllm_engine import triton_cpu


pytestmark = pytest.mark.vllm


TRITON = Path(sys.prefix) / "triton"
"""Folder where `make` installs Triton, outside of the import path, since vLLM's CPU build must not find it."""


def run(name: str, folder: Path, *paths: Path, **variables: str) -> dict[str, Any]:
    """Returns the result of a scenario that runs in a new process.

    Args:
        name: the function in `scenarios`.
        folder: where it saves its models.
        *paths: further entries of the import path.
        **variables: further environment variables.
    """
    own = environment(OMP_NUM_THREADS="1", **variables)
    own["PYTHONPATH"] = os.pathsep.join([*map(str, paths), own["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-m", "integration_tests.vllm_engine.scenarios", name, str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        env=own,
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(results[0].removeprefix("RESULT "))


@pytest.mark.parametrize("name", ["ngram", "draft_model"])
def test_drafted_tokens_change_no_answer(name: str, tmp_path: Path) -> None:
    """Draft tokens use the vectors of the request."""
    found = run(name, tmp_path)
    assert found["accepted"] > 0
    assert found["misses"] == 0


@pytest.mark.parametrize("name", ["two_ranks", "two_ranks_share_heads"])
def test_ranks_share_a_model(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path)["misses"] == 0


def test_the_model_is_compiled(tmp_path: Path) -> None:
    found = run("compiled", tmp_path)
    assert found["misses"] == 0
    assert found["mode"] != "NONE"
    assert found["layers"] == 4 * 3
    assert found["calls"] > 50 * found["layers"]


def test_thousands_of_requests_leave_nothing_behind(tmp_path: Path) -> None:
    """Memory may grow by 2% after a fifth of the requests, beside oneDNN's cache of up to 1,024 compiled kernels."""
    found = run("soak", tmp_path, ONEDNN_PRIMITIVE_CACHE_CAPACITY="32")
    assert found["misses"] == 0 and found["tokens"] == 40_000
    assert found["slots"] == 0 and found["adapters"] <= 8 < 1_000 < found["loads"]
    _, warm, last = found["megabytes"]
    assert last < 1.02 * warm


def test_the_second_model_runner(tmp_path: Path) -> None:
    """Runs with Triton's interpreter, without a GPU."""
    backend = tmp_path / "backend" / "triton_cpu-1.dist-info"
    backend.mkdir(parents=True)
    (backend / "METADATA").write_text("Metadata-Version: 2.1\nName: triton-cpu\nVersion: 1\n")
    entry = f"[triton.backends]\ncpu = {triton_cpu.__name__}\n"
    (backend / "entry_points.txt").write_text(entry)
    found = run("second_runner", tmp_path, TRITON, backend.parent, TRITON_INTERPRET="1", VLLM_USE_V2_MODEL_RUNNER="1")
    assert found["misses"] == 0
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner"
