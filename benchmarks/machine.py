"""One line about the machine and the versions that a benchmark's numbers belong to.

python benchmarks/machine.py
"""

import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def describe() -> str:
    """Processor, cores, load and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "megatron-core", "numpy"))
    cores = len(os.sched_getaffinity(0))
    return (
        f"{names[0] if names else platform.machine()}, {cores} cores, load {os.getloadavg()[0]:.1f}, "
        f"Python {platform.python_version()}, {packages}"
    )


if __name__ == "__main__":
    sys.stdout.write(describe() + "\n")
