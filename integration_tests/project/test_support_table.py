"""The support table is made from the outcomes of tests, and stays so."""

import json
from pathlib import Path
from typing import Any

import pytest
import support

from integration_tests.helpers.support_table import rows_of


pytest_plugins = ["pytester"]


def row(feature: str, method: str, architecture: str | None = None, **changes: Any) -> dict[str, Any]:
    fields = {"feature": feature, "method": method, "architecture": architecture}
    return {**fields, "refused": False, "outcome": "passed", **changes}


def test_marked_tests_make_the_table(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\nmarkers = support(feature, refused=False): a row of the support table")
    (pytester.path / "conftest.py").write_text('pytest_plugins = ["integration_tests.helpers.support_table"]\n')
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.support("generation")
        @pytest.mark.parametrize("architecture", ["gpt2", "llama"])
        @pytest.mark.parametrize("method", ["FanLoRA", "PARA"])
        def test_generation(method, architecture):
            pass

        @pytest.mark.support("merging", refused=True)
        @pytest.mark.parametrize("method", ["PARA"])
        def test_merging(method):
            pass

        @pytest.mark.support("flight")
        def test_flight():
            pytest.skip("no wings")

        @pytest.mark.support("saving")
        @pytest.mark.parametrize("size", [1, 2])
        def test_saving(size):
            assert size == 1

        def test_other():
            pass
        """
    )
    pytester.runpytest("--support-results=out.json", "-q")
    results = json.loads((pytester.path / "out.json").read_text())
    assert results["rows"] == [
        row("flight", "FanLoRA", outcome="skipped"),
        row("generation", "FanLoRA", "gpt2"),
        row("generation", "FanLoRA", "llama"),
        row("generation", "PARA", "gpt2"),
        row("generation", "PARA", "llama"),
        row("merging", "PARA", refused=True),
        row("saving", "FanLoRA", outcome="failed"),
    ]
    with pytest.raises(ValueError, match=r"1 rows failed, for instance of saving \(FanLoRA, None\)"):
        support.page(results)
    results["rows"][-1]["outcome"] = "passed"
    text = support.page(results)
    assert "| merging |  | refused |" in text
    assert "| flight |  |  |" in text
    assert "| saving | yes |  |" in text
    assert "## PARA by architecture\n\n|  | generation |\n| --- | :-: |\n| gpt2 | yes |\n| llama | yes |\n" in text


def test_what_is_partly_refused() -> None:
    rows = [row("packing", "PARA"), row("packing", "PARA", refused=True)]
    assert "| packing |  | in part |" in support.page({"versions": {}, "rows": rows})


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    support.main(support.RESULTS, tmp_path / "support.md")
    assert (tmp_path / "support.md").read_text() == support.PAGE.read_text()


def test_every_row_of_the_page_still_has_a_test(request: pytest.FixtureRequest) -> None:
    """Guards against a table with rows that no test shows any more."""
    config = request.config
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if not whole or config.option.keyword or config.option.markexpr not in ("", "not vllm"):
        pytest.skip("only a run of the whole suite sees all the tests")
    shown = {tuple(found) for item in request.session.items for found in rows_of(item)}
    fields = ("feature", "method", "architecture", "refused")
    claimed = {tuple(entry[field] for field in fields) for entry in json.loads(support.RESULTS.read_text())["rows"]}
    assert not claimed - shown
