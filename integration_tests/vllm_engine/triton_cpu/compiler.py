"""The compiler that Triton looks for; the interpreter never calls it."""

from typing import Any

from triton.backends import compiler


def _unused(*arguments: Any, **options: Any) -> Any:
    raise NotImplementedError


CpuCompiler = type(
    "CpuCompiler", (compiler.BaseBackend,), dict.fromkeys(compiler.BaseBackend.__abstractmethods__, _unused)
)
