"""Python in a new process, which can import what the tests can."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch


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


class OtherProcess:
    """A process that loads saved adapters: one for many tests, since importing torch takes seconds.

    Args:
        first: what the process runs before anything else, such as the import that makes the methods known to PEFT.
    """

    CODE = """
import sys, torch, transformers
from peft import PeftModel
for line in sys.stdin:
    model_class, base, adapter, batch, output = line.rstrip("\\n").split("\\t")
    base = getattr(transformers, model_class).from_pretrained(base)
    model = PeftModel.from_pretrained(base, adapter).eval()
    with torch.no_grad():
        torch.save(model(**torch.load(batch)).logits, output)
    print(*sorted(name for name in sys.modules if name in ("peft", "peft_fanlora")), flush=True)
"""

    def __init__(self, first: str = "") -> None:
        command = [sys.executable, "-c", f"{first}\n{self.CODE}"]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.modules: list[str] = []
        """Which of `peft` and `peft_fanlora` the process has imported."""

    def __enter__(self) -> "OtherProcess":
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=60)

    def logits(self, model_class: type, base: Path, adapter: Path, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Returns what the saved adapter computes on its saved base model."""
        with tempfile.TemporaryDirectory() as folder:
            given, found = Path(folder, "batch.pt"), Path(folder, "logits.pt")
            torch.save(batch, given)
            assert self._process.stdin and self._process.stdout
            self._process.stdin.write("\t".join(map(str, (model_class.__name__, base, adapter, given, found))) + "\n")
            self._process.stdin.flush()
            self.modules = self._process.stdout.readline().split()
            assert self.modules, "the process has failed; its last words are above"
            return torch.load(found)
