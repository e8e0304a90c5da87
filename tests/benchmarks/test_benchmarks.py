"""Every benchmark still runs, one short round of each; what it prints there is no measurement."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [path.name for path in sorted(ROOT.glob("benchmarks/bench_*.py")) if "kernels" not in path.name]


CPU = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def lines_of(script: str, *options: str, **variables: str) -> list[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("script", SCRIPTS)
def test_benchmark_runs(script: str) -> None:
    lines = lines_of(script, **CPU)
    assert any(character.isdigit() for line in lines for character in line), lines


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("bench_cpu_kernels.py", ["--memory", "kept", "--threads", "1"], ["layer_norm ", "bias_gelu, erf", "adam_var"]),
        ("bench_kernels_step.py", [], ["demo "]),
    ],
)
def test_benchmark_of_kernels_prints_its_rows(script: str, options: list[str], rows: list[str]) -> None:
    lines = lines_of(script, *options)
    assert all(any(line.startswith(row) for line in lines) for row in rows), lines
