"""Generates docs/support.md from the results of the tests that have the mark `support`.

pytest -m support --support-results=benchmarks/results/support.json
python benchmarks/support.py
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "support.json"
PAGE = ROOT / "docs" / "support.md"
METHODS = ("FanLoRA", "PARA")

INTRODUCTION = """\
# Supported features

Every entry below is the result of tests with tiny models that are created from configurations (`make support` runs the tests
and generates this page). **yes**: supported. **refused**: raises an error that gives the reason and an alternative. **in part**:
some cases are supported and some are refused. Empty: not tested.

Tested with {versions}.
"""


def cell(rows: list[dict[str, Any]]) -> str:
    """Returns the table entry for the tests of one feature: "yes", "refused", "in part", or "" if none passed."""
    kinds = {"refused" if row["refused"] else "yes" for row in rows if row["outcome"] == "passed"}
    return "in part" if len(kinds) > 1 else "".join(kinds)


def table(first: str, index: list[str], columns: list[str], fields: dict[tuple[str, str], str]) -> str:
    """Returns a Markdown table; `fields` has the entries by (row, column)."""
    lines = [[first, *columns], ["---", *(":-:" for _ in columns)]]
    lines += [[row, *(fields.get((row, column), "") for column in columns)] for row in index]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def page(results: dict[str, Any]) -> str:
    """Returns the Markdown text of the page.

    Raises:
        ValueError: a test failed.
    """
    rows = results["rows"]
    failed = [
        f"{row['feature']} ({row['method']}, {row['architecture']})" for row in rows if row["outcome"] == "failed"
    ]
    if failed:
        raise ValueError(
            f"Tests of {len(failed)} rows failed, for instance of {failed[0]}, so their entries are unknown: fix them "
            "first."
        )
    grouped: dict[tuple[str, str, str | None], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["feature"], row["method"], row["architecture"]), []).append(row)
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    parts = [INTRODUCTION.format(versions=versions)]

    features = sorted({feature for feature, _, architecture in grouped if architecture is None}, key=str.lower)
    fields = {(key[0], key[1]): cell(found) for key, found in grouped.items() if key[2] is None}
    parts.append("## Features\n\n" + table("", features, list(METHODS), fields) + "\n")

    for method in METHODS:
        own = {key: cell(found) for key, found in grouped.items() if key[1] == method and key[2] is not None}
        features = sorted({feature for feature, _, _ in own}, key=str.lower)
        architectures = sorted({str(architecture) for _, _, architecture in own})
        fields = {(str(architecture), feature): text for (feature, _, architecture), text in own.items()}
        parts.append(f"## {method} by architecture\n\n" + table("", architectures, features, fields) + "\n")
    return "\n".join(parts)


def main(
    results: Annotated[Path, typer.Option(help="Result file of `pytest --support-results`.")] = RESULTS,
    output: Annotated[Path, typer.Option(help="Markdown file to write.")] = PAGE,
) -> None:
    """Writes the page."""
    output.write_text(page(json.loads(results.read_text())), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
