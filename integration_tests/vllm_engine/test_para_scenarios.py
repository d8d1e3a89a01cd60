"""PARA with speculative decoding and on several ranks, token for token as in transformers; `make test-vllm` runs these."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from integration_tests.helpers.processes import environment


pytestmark = pytest.mark.vllm


def run(name: str, folder: Path) -> dict[str, Any]:
    """Runs a scenario in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "integration_tests.vllm_engine.scenarios", name, str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        env=environment(OMP_NUM_THREADS="1"),
        check=False,
    )
    results = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert results, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(results[0].removeprefix("RESULT "))


@pytest.mark.parametrize("name", ["ngram", "draft_model"])
def test_drafted_tokens_change_no_answer(name: str, tmp_path: Path) -> None:
    """Drafted tokens lie behind the prompt and read its vectors."""
    found = run(name, tmp_path)
    assert found["accepted"] > 0
    assert found["misses"] == 0


@pytest.mark.parametrize("name", ["two_ranks", "two_ranks_share_heads"])
def test_ranks_share_a_model(name: str, tmp_path: Path) -> None:
    assert run(name, tmp_path)["misses"] == 0


@pytest.mark.parametrize("name", ["compiled", "compiled_in_pieces"])
def test_the_model_is_compiled(name: str, tmp_path: Path) -> None:
    found = run(name, tmp_path)
    assert found["misses"] == 0
    assert found["layers"] == 4 * 3
    assert found["calls"] > 100 * found["layers"] / 4
