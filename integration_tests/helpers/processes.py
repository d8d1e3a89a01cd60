"""Python in a new process, which can import what the tests can.

Importing PEFT takes many seconds. New processes are therefore forked from one per pytest worker that has imported PEFT and
nothing of this project, except where the imports themselves are tested.
"""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version


ROOT = Path(__file__).parents[2]
CAN_RESUME_IN_TWO = Version(version("transformers")) >= Version("5.18")
"""Whether trainers load the optimizer's state of several CPU processes."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["peft"])


def environment(**variables: str) -> dict[str, str]:
    """Returns the environment of a process that imports from the repository, its examples and its benchmarks."""
    paths = [str(ROOT), str(ROOT / "examples"), str(ROOT / "benchmarks")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **variables}


def variables_of_two() -> list[dict[str, str]]:
    """Returns the environment variables with which torchrun starts each of two processes on one machine."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def run_new_python(*arguments: object, cwd: Path = ROOT) -> str:
    """Runs a Python that has imported nothing to its end, and returns what it printed."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run_python(*arguments: object, cwd: Path = ROOT) -> str:
    """Runs "-c" and code, or a script with its arguments, in a forked process, and returns what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        process = start_python(Path(folder), *arguments, cwd=cwd)
        process.join()
        assert process.exitcode == 0, Path(folder, "stderr").read_text()[-3000:]
        return Path(folder, "stdout").read_text()


def start_python(output: Path, *arguments: object, cwd: Path = ROOT, **variables: str) -> BaseProcess:
    """Starts what `run_python` runs, with more environment variables.

    It prints to the files `stdout` and `stderr` of the folder `output`.
    """
    environment = {**os.environ, **variables}
    process = _FORKS.Process(target=_run, args=(list(map(str, arguments)), str(cwd), str(output), environment))
    process.start()
    return process


def _run(arguments: list[str], cwd: str, output: str, variables: dict[str, str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(output, name), os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.update(variables)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        runpy.run_path(arguments[0], run_name="__main__")


class OtherProcess:
    """A forked process that loads saved adapters, one for many tests.

    Args:
        first: what the process runs before anything else, such as the import that makes the methods known to PEFT.
    """

    def __init__(self, first: str = "") -> None:
        self._pool = ProcessPoolExecutor(1, _FORKS, initializer=exec, initargs=(first,))
        self.modules: list[str] = []
        """Which of `peft` and `peft_fanlora` the process has imported."""

    def __enter__(self) -> "OtherProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def logits(self, model_class: type, base: Path, adapter: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns what the saved adapter computes on its saved base model."""
        arrays = {name: tensor.numpy() for name, tensor in batch.items()}
        logits, self.modules = self._pool.submit(_logits, model_class.__name__, base, adapter, arrays).result()
        return torch.from_numpy(logits)


@torch.no_grad()
def _logits(model_class: str, base: Path, adapter: Path, arrays: dict[str, Any]) -> tuple[Any, list[str]]:
    import transformers
    from peft import PeftModel

    model = PeftModel.from_pretrained(getattr(transformers, model_class).from_pretrained(base), adapter).eval()
    logits = model(**{name: torch.from_numpy(array) for name, array in arrays.items()}).logits
    return logits.numpy(), sorted(name for name in sys.modules if name in ("peft", "peft_fanlora"))
