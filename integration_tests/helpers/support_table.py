"""Collects what the tests show to be supported, for the table in the documentation.

A test that shows a row of that table is marked `@pytest.mark.support("feature")`, and one that shows a refusal
`@pytest.mark.support("feature", refused=True)`. Its parameters `method` ("FanLoRA" or "PARA") and `architecture` (or
`name`) are the columns; a test without the first belongs to the method whose tests it stands among.
`pytest --support-results=FILE` writes the outcomes of the marked tests as JSON, from which `benchmarks/support.py` makes the
page.
"""

import importlib.metadata
import json
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest


METHODS = ("FanLoRA", "PARA")
PACKAGES = ("peft", "transformers", "trl", "torch")


class Row(NamedTuple):
    """What a marked test is about; `architecture` is None where the test has no such parameter."""

    feature: str
    method: str
    architecture: str | None
    refused: bool


def rows_of(item: pytest.Item) -> list[Row]:
    """Returns the rows of the table that a test shows."""
    parameters = getattr(item, "callspec", None)
    values: dict[str, Any] = dict(parameters.params) if parameters is not None else {}
    method = values.get("method")
    if method not in METHODS:
        method = "PARA" if "para" in item.path.parts else "FanLoRA"
    architecture = values.get("architecture", values.get("name"))
    return [
        Row(marker.args[0], method, architecture, marker.kwargs.get("refused", False))
        for marker in item.iter_markers("support")
    ]


class SupportResults:
    """Remembers the outcome of each marked test, and writes them all at the end.

    Args:
        file: where to write.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.outcomes: dict[Row, set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Notes how a test went: "passed", "failed" or "skipped"."""
        report = yield
        if report.when == "call" or not report.passed:
            for row in rows_of(item):
                self.outcomes.setdefault(row, set()).add(report.outcome)
        return report

    def pytest_sessionfinish(self) -> None:
        """Writes one entry for each row: the worst outcome of its tests."""
        rows = ",\n".join(json.dumps(entry) for entry in self._entries())
        self.file.write_text(f'{{"versions": {json.dumps(_versions())}, "rows": [\n{rows}\n]}}\n')

    def _entries(self) -> Iterable[dict[str, Any]]:
        for row in sorted(self.outcomes, key=lambda row: tuple(map(str, row))):
            outcome = next(kind for kind in ("failed", "passed", "skipped") if kind in self.outcomes[row])
            yield {**row._asdict(), "outcome": outcome}


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option."""
    parser.addoption("--support-results", type=Path, help="write what the tests show to be supported to this file")


def pytest_configure(config: pytest.Config) -> None:
    """Collects only where a file is asked for."""
    if file := config.getoption("support_results"):
        config.pluginmanager.register(SupportResults(file))
