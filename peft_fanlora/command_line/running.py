"""The command `run`: runs another program with FanLoRA and PARA registered with PEFT.

Programs that load adapters with PEFT and do not import this package fail with `KeyError: 'PARA'`. `peft-fanlora run`
replaces itself by `python -m` with this module, so that the program keeps its own arguments, signals and exit code.
"""

import os
import runpy
import sys
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import NoReturn


def replace_process(arguments: list[str]) -> NoReturn:
    """Replaces this process by a Python process that registers both methods and runs the program.

    Args:
        arguments: the arguments of `peft-fanlora run`.
    """
    if arguments[0] != "-m" and not Path(arguments[0]).is_file():
        _console_script(arguments[0])
    os.execv(sys.executable, [sys.executable, "-m", __name__, *arguments])


def run(arguments: list[str]) -> None:
    """Runs a program with the same `sys.argv` and `sys.path` as when started by Python or the shell.

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
            f"Error: there is no file and no console script {name!r} in this environment: pass a script, -m and a "
            "module, or the name of an installed command.",
            file=sys.stderr,
        )
        sys.exit(2)
    return next(iter(found))


if __name__ == "__main__":
    run(sys.argv[1:])
