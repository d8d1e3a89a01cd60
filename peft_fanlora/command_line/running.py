"""`run`: another program in this process, with FanLoRA and PARA registered with PEFT.

Programs that load adapters through PEFT and never import this package stop with `KeyError: 'PARA'`. This module is what
`peft-fanlora run` executes in its place, by `python -m`, so that the program has its own arguments, signals and exit code.
"""

import os
import runpy
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn


def replace_process(arguments: list[str]) -> NoReturn:
    """Replaces this process by Python with both methods registered, and then the program.

    Args:
        arguments: what follows `peft-fanlora run`.
    """
    os.execv(sys.executable, [sys.executable, "-m", __name__, *arguments])


def run(arguments: list[str]) -> None:
    """Runs a program as Python or the shell would, with `sys.argv` and `sys.path` as they are there.

    Args:
        arguments: a script, `-m` and a module, or the name of an installed console script; then its own arguments.
    """
    program, *rest = arguments
    if program == "-m" and rest:
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)  # sys.path begins with the working directory
    elif Path(program).is_file():
        sys.argv, sys.path[0] = arguments, str(Path(program).resolve().parent)
        runpy.run_path(program, run_name="__main__")
    else:
        script = _console_script(program)
        sys.argv, sys.path[0] = arguments, str(Path(sys.executable).parent)
        sys.exit(script.load()())


def _console_script(name: str) -> EntryPoint:
    found = entry_points(group="console_scripts", name=name)
    if not found:
        print(
            f"Error: there is no file and no console script {name!r} in this environment: pass a script, -m and a module, "
            "or the name of an installed command.",
            file=sys.stderr,
        )
        sys.exit(2)
    return next(iter(found))


if __name__ == "__main__":
    run(sys.argv[1:])
