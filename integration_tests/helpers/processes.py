"""Python in a new process, which can import what the tests can."""

import os
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a process that imports from the repository, its examples and its benchmarks."""
    paths = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def run_python(*arguments: object, cwd: Path = ROOT) -> str:
    """Runs Python to its end, and returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
