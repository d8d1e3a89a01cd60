"""Tests import from `helpers` only: none imports another test, and none changes the import path."""

import ast
from pathlib import Path

import pytest


FOLDER = Path(__file__).parents[1]
FILES = [path for path in sorted(FOLDER.rglob("*.py")) if "helpers" not in path.parts]


def imported(tree: ast.AST) -> set[str]:
    """Returns the modules that a file imports, and the names that it imports from them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module or ''}.{alias.name}" for alias in node.names} | {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(FOLDER).as_posix())
def test_no_file_imports_a_test(path: Path) -> None:
    modules = {path.stem for path in FOLDER.rglob("test_*.py")}
    found = {name for name in imported(ast.parse(path.read_text())) if modules & set(name.split("."))}
    assert not found, f"{path.name} imports {found}: move what it needs to integration_tests/helpers"


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name.startswith(("test_", "conftest"))], ids=lambda path: path.stem
)
def test_no_test_changes_the_import_path(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        uses = isinstance(node, ast.Attribute) and node.attr == "path" and ast.unparse(node.value) == "sys"
        assert not uses, (
            f"{path.name}:{node.lineno} uses sys.path: a new process gets its own from helpers/processes.py"
        )
