"""A quick part of PEFT's own tests (`make test-peft` runs all), and what their runner makes of failures."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest

from integration_tests.peft_suite import page, run
from integration_tests.peft_suite.sources import SHA256


ROOT = Path(__file__).parents[2]
QUICK = "test_methods or test_save_pretrained or test_disable_adapters or test_only_params or test_multiple_active"


@pytest.mark.skipif(find_spec("diffusers") is None, reason="PEFT's tests need diffusers")
@pytest.mark.skipif(peft.__version__ not in SHA256, reason="the suite knows other versions of PEFT")
@pytest.mark.parametrize("method", run.METHODS)
def test_a_quick_part_of_pefts_own_tests(method: str, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    command = [sys.executable, ROOT / "integration_tests/peft_suite/run.py", "--method", method, "--file", "config"]
    command += ["--file", "custom_models", "-k", f"({QUICK}) and not Conv and not with_merging", "--results", results]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    outcomes = json.loads(results.read_text())["methods"][method]["test_custom_models.py"]
    assert outcomes["passed"][""] > 40
    assert "failed" not in outcomes


def test_the_page_is_made_from_the_results() -> None:
    content = json.loads(page.RESULTS.read_text())
    assert not any("failed" in file for files in content["methods"].values() for file in files.values())
    assert page.PAGE.read_text() == page.page(content)
