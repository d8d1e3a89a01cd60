"""Imports of the package go down only, and none is circular: those in functions and for type checking count as well."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[2] / "peft_fanlora"
MODULES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in sorted(PACKAGE.rglob("*.py"))}
NAMES = {".".join(parts).removesuffix(".__init__") for parts in MODULES.values()}
MAY_IMPORT = {
    "command_line": {"fanlora", "para", "serving", "sharing", "timing"},
    "fanlora": {"registration", "serving", "sharing", "timing", "version"},
    "para": {"registration", "serving", "sharing"},
    "registration": {"sharing"},
    "serving": set(),
    "sharing": set(),
    "timing": {"serving"},
    "version": set(),
    "vllm_plugin": {"para", "sharing"},
}


def imports(path: Path) -> set[str]:
    """Returns what a module imports of the package, named within it."""
    package = MODULES[path][:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        if isinstance(node, ast.Import) or node.level == 0:
            named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(name.partition(".")[0] == "peft_fanlora" for name in named), f"{path}: import relatively"
            continue
        base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
        source = ".".join(part for part in base if part)
        for alias in node.names:
            inside = f"{source}.{alias.name}".lstrip(".")
            found.add(inside if inside in NAMES else source)
    return found


GRAPH = {".".join(parts).removesuffix(".__init__"): imports(path) for path, parts in MODULES.items()}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_lies_below_it(room: str) -> None:
    own = [module for module in GRAPH if module.partition(".")[0] == room]
    assert own, f"there is no {room}"
    above = {
        f"{module} imports {other}"
        for module in own
        for other in GRAPH[module]
        if other.partition(".")[0] not in {room, *MAY_IMPORT[room]}
    }
    assert not above


def test_each_room_has_its_place() -> None:
    assert {module.partition(".")[0] for module in GRAPH} - {"__init__"} == set(MAY_IMPORT)


def test_no_import_is_circular() -> None:
    TopologicalSorter(GRAPH).prepare()  # a CycleError names the modules


def test_core_imports_torch_alone() -> None:
    """What an engine can use without PEFT and transformers: the functions of tensors in a folder called core."""
    for path in (path for path, parts in MODULES.items() if "core" in parts):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{path} imports from outside of core"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                named = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                assert {name.partition(".")[0] for name in named} <= {"torch", *sys.stdlib_module_names}, path
