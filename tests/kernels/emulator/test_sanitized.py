"""The kernels and the emulator itself under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.building import ROOT, CannotBuildError, tool


def _runtime(name: str) -> str:
    """Where g++ keeps a library; a bare name where it has none."""
    done = subprocess.run([tool("g++"), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("op", ["layer_norm", "softmax", "bias_gelu", "cross_entropy"])
def test_nothing_is_found(op: str) -> None:
    try:
        libraries = [_runtime("libasan.so"), _runtime("libubsan.so"), _runtime("libstdc++.so")]
    except CannotBuildError as missing:
        pytest.skip(str(missing))
    if not all(Path(each).is_absolute() for each in libraries):
        pytest.skip("g++ has no sanitizers")
    environment = {
        **os.environ,
        "KERNEL_TEST_SANITIZED": "1",
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    tests = [f"tests/kernels/test_{op}.py", "-k", "emulator-reverse", "-m", "not slow"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    assert " passed" in done.stdout
