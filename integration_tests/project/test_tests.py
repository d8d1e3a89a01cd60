"""Tests import from `helpers` only: none imports another test, and none changes the import path; groups reach pytest-xdist."""

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1]
TESTS = {path.stem for path in FOLDER.rglob("test_*.py")}


def found_in_tests(offends: Callable[[ast.AST], bool]) -> list[str]:
    """Returns where a node of a file of tests, or of what they share, offends against a rule."""
    return [
        f"{path.relative_to(FOLDER)}:{node.lineno}: {ast.unparse(node)}"
        for path in FOLDER.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if offends(node) and path != FOLDER / "peft_suite/run.py"  # a script that sets up its own process
    ]


def imports_a_test(node: ast.AST) -> bool:
    names = []
    if isinstance(node, ast.ImportFrom):
        names = [node.module or "", *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    return any(TESTS & set(name.split(".")) for name in names)


def uses_the_import_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"


def test_no_file_imports_a_test() -> None:
    """What two of them need stands in integration_tests/helpers."""
    assert imports_a_test(ast.parse("from integration_tests.project.test_tests import TESTS").body[0])
    assert not found_in_tests(imports_a_test)


def test_no_test_changes_the_import_path() -> None:
    """A new process gets its path from integration_tests/helpers/processes.py."""
    assert uses_the_import_path(ast.parse("sys.path").body[0].value)
    assert not found_in_tests(uses_the_import_path)


@pytest.mark.xdist_group("a_group")
def test_a_group_reaches_xdist(request: pytest.FixtureRequest) -> None:
    """pytest-xdist 3.8 marks the ids of grouped tests, which pytest 9.2 no longer shows: fixtures are then made twice."""
    assert request.node.nodeid.endswith("@a_group") == ("PYTEST_XDIST_WORKER" in os.environ)
