"""The description of the machine that every result file contains."""

import platform
from importlib.metadata import version
from pathlib import Path

import torch


def facts() -> dict[str, str | int]:
    """Returns the processor, the number of threads, the accelerator, and the versions of Python and packages."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }
