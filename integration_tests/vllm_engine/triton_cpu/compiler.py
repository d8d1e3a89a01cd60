"""The compiler class that a Triton backend must have; the interpreter does not use it."""

from typing import Any

from triton.backends import compiler


def _unused(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError


CpuCompiler = type(
    "CpuCompiler", (compiler.BaseBackend,), dict.fromkeys(compiler.BaseBackend.__abstractmethods__, _unused)
)
