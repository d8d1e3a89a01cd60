"""Runs PEFT's own tests on FanLoRA and PARA, and reports the outcomes.

python integration_tests/peft_suite/run.py                    # everything, about twenty minutes on two CPU cores
python integration_tests/peft_suite/run.py --method PARA -k "config and not merge"
python integration_tests/peft_suite/run.py --results benchmarks/results/peft-tests.json
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Annotated

import peft
import torch
import transformers
import typer


ROOT = Path(__file__).parents[2]
PATHS = [str(ROOT / folder) for folder in (".", "examples")]
sys.path[:0] = PATHS

from assets import cache_folder  # noqa: E402

from integration_tests.peft_suite.sources import tests_folder  # noqa: E402


METHODS = ("FanLoRA", "PARA")
FILES = (
    "config",
    "mapping",
    "auto",
    "hub_features",
    "mixed",
    "other",
    "helpers",
    "low_level_api",
    "tuners_utils",
    "seq_classifier",
    "token_classification_qa",
    "custom_models",
    "feature_extraction_models",
    "initialization",
    "encoder_decoder_models",
    "decoder_models",
)
"""PEFT's test files that speak of every method, or of LoRA as an example of one."""
LORA_FILES = (
    "integrations",
    "trainable_tokens",
    "target_parameters",
    "lora_variants",
    "lorafa",
    "loraplus",
    "lora_ga",
    "lora_intruders",
    "lora_conversion",
)
"""Those about LoRA's own options and tools, which FanLoRA shares. What is left is each about one of PEFT's other methods,
about quantised models, or about GPUs."""
EXPECTED = ("passed", "refused", "inapplicable", "left_out", "skipped", "not ours")


def environment(method: str) -> dict[str, str]:
    """Returns the environment of a run: offline, on the method's stand-in hub, which is made where it is missing."""
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "PYTHONPATH": os.pathsep.join(PATHS),
        "TOKENIZERS_PARALLELISM": "false",
    }
    script = Path(__file__).with_name("hub.py")
    made_by = script.read_bytes() + f"{transformers.__version__} {peft.__version__}".encode()
    home = cache_folder() / f"hub-{method}-{hashlib.sha256(made_by).hexdigest()[:12]}"
    if not home.exists():
        with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
            variables["HF_HOME"] = scratch
            command = [sys.executable, "-W", "ignore", str(script), method]
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"making the stand-in hub failed:\n{done.stderr}")
            shutil.copytree(scratch, home)
    return {**variables, "HF_HOME": str(home)}


def run(method: str, files: list[str], keyword: str) -> tuple[dict[str, str], list[str]]:
    """Runs PEFT's test files on a method.

    Returns:
        The outcome of each test, and the patterns in `deselected.toml` that matched no test.

    Raises:
        RuntimeError: pytest did not come to an end.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, settings = Path(folder, "results.json"), Path(folder, "pytest.ini")
        settings.write_text("[pytest]\n")
        command = [sys.executable, "-m", "pytest", "-c", settings, "--rootdir", tests_folder().parent, "-p"]
        command += [
            "integration_tests.peft_suite.plugin",
            "-p",
            "no:cacheprovider",
            "--method",
            method,
            "--results",
            results,
            "-q",
        ]
        command += ["--tb=short", "-rfE", "-W", "ignore", "-k", keyword]
        command += [f"tests/test_{file}.py" for file in files]
        sys.stdout.flush()
        subprocess.run(list(map(str, command)), cwd=tests_folder().parent, env=environment(method))
        if not results.exists():
            raise RuntimeError(f"PEFT's tests did not run on {method}; pytest says why above.")
        content = json.loads(results.read_text())
    return content["outcomes"], content["unused"]


def summary(outcomes: dict[str, str]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns how many tests of each file had which outcome for which reason: file -> outcome -> reason -> number."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for name, outcome in outcomes.items():
        kind, _, reason = outcome.partition(": ")
        reasons = found.setdefault(name.partition("::")[0], {}).setdefault(kind, {})
        reasons[reason] = reasons.get(reason, 0) + 1
    return found


def main(
    method: Annotated[list[str], typer.Option(help="FanLoRA, PARA, or both.")] = list(METHODS),  # noqa: B006
    file: Annotated[list[str] | None, typer.Option(help="One of PEFT's test files, such as config.")] = None,
    k: Annotated[str, typer.Option("-k", help="Runs the tests that this expression of pytest names.")] = "",
    results: Annotated[Path | None, typer.Option(help="JSON whose totals of the files that run are renewed.")] = None,
) -> None:
    """Runs PEFT's own tests on our methods; fails if a test fails, or if a reason to leave tests out is stale."""
    failed = False
    for name in method:
        files = file or [*FILES, *(LORA_FILES if name == "FanLoRA" else ())]
        outcomes, unused = run(name, files, k)
        totals = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
        print(f"{name}: " + ", ".join(f"{count} {kind}" for kind, count in sorted(totals.items())))
        failed |= any(kind not in EXPECTED for kind in totals)
        if file is None and not k and unused:
            print(f"{name}: these patterns of deselected.toml match no test: {unused}")
            failed = True
        if results is not None:
            content = json.loads(results.read_text()) if results.exists() else {"methods": {}}
            content["versions"] = {module.__name__: module.__version__ for module in (peft, torch, transformers)}
            content["methods"].setdefault(name, {}).update(summary(outcomes))
            results.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    raise typer.Exit(int(failed))


if __name__ == "__main__":
    typer.run(main)
