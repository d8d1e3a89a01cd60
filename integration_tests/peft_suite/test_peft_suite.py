"""A quick part of PEFT's own tests (`make test-peft` runs all), and what their runner makes of failures."""

import json
from importlib.util import find_spec
from pathlib import Path

import peft
import pytest
import typer

from integration_tests.peft_suite import page, run
from integration_tests.peft_suite.sources import SHA256


QUICK = "test_methods or test_save_pretrained or test_disable_adapters or test_only_params or test_multiple_active"


@pytest.mark.skipif(find_spec("diffusers") is None, reason="PEFT's tests need diffusers")
@pytest.mark.skipif(peft.__version__ not in SHA256, reason="the suite knows other versions of PEFT")
@pytest.mark.parametrize("method", run.METHODS)
def test_a_quick_part_of_pefts_own_tests(method: str, tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    expression = f"({QUICK}) and not Conv and not with_merging"
    with pytest.raises(typer.Exit) as done:
        run.main([method], ["config", "custom_models"], expression, results)
    assert done.value.exit_code == 0
    outcomes = json.loads(results.read_text())["methods"][method]["test_custom_models.py"]
    assert outcomes["passed"][""] > 40
    assert "failed" not in outcomes


def test_the_page_is_made_from_the_results() -> None:
    content = json.loads(page.RESULTS.read_text())
    assert not any("failed" in file for files in content["methods"].values() for file in files.values())
    assert page.PAGE.read_text() == page.page(content)
