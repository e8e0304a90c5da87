"""The kernels' benchmarks run: one short round of each."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize(
    ("script", "options", "rows"),
    [
        ("bench_cpu_kernels.py", ["--memory", "kept", "--threads", "1"], ["layer_norm ", "bias_gelu, erf", "adam_var"]),
        ("bench_kernels_step.py", [], ["demo "]),
    ],
)
def test_a_short_round_prints_its_rows(script: str, options: list[str], rows: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), "--quick", *options],
        capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert all(any(line.startswith(row) for line in lines) for row in rows), done.stdout
