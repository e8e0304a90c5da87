"""Every benchmark still runs; what it prints there is no measurement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Those of the kernels compile them first: test_kernel_benchmarks.py.
SCRIPTS = [path for path in sorted(ROOT.glob("benchmarks/bench_*.py")) if "kernels" not in path.name]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_benchmark_runs(script: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), "--quick"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert any(character.isdigit() for character in done.stdout), done.stdout
