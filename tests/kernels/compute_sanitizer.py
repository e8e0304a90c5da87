"""``python -m tests.kernels.compute_sanitizer``: the kernels' tests on a GPU under NVIDIA's compute-sanitizer.

Three times, for what each tool finds: accesses outside of allocations, races in shared memory, and reads of memory that
nobody wrote. Says so and ends with 0 where compute-sanitizer is not installed.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck", "initcheck")
FOUND = 99
"""What compute-sanitizer ends with where it found something; pytest's own statuses are below."""


def commands(program: str) -> Iterator[list[str]]:
    gpu_tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "gpu", "-k", "cuda", "tests/kernels"]
    for tool in TOOLS:
        checked = [program, "--tool", tool, "--error-exitcode", str(FOUND), "--target-processes", "all"]
        yield [*checked, sys.executable, *gpu_tests]


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def main() -> int:
    """The first status that is not 0."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        _say("compute-sanitizer is not on PATH: the kernels' tests are not run under it")
        return 0
    for command in commands(program):
        _say(" ".join(command))
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        if status != 0:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
