"""Every op gives the same bytes from run to run and, on the emulator, in every order of threads and blocks."""

from collections.abc import Callable

import pytest

from tests.kernels.accuracy import same_bits
from tests.kernels.backends import BACKENDS, KernelBackend
from tests.kernels.building import CannotBuildError
from tests.kernels.every_op import OPS, Results
from tests.kernels.thinning import Everywhere

EVERYWHERE: Everywhere = {}

# A vector's multiple or not, rows of a warp or less and of several warps.
COLS = [24, 31, 1048, 1025]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_in_every_order(op: Callable[[KernelBackend, int], Results]) -> None:
    try:
        forward, *others = (BACKENDS[f"emulator-{order}"]() for order in ("forward", "reverse", "random"))
    except CannotBuildError as missing:
        pytest.skip(str(missing))
    for cols in COLS:
        expected = op(forward, cols)
        for other in others:
            for name, value in op(other, cols).items():
                same_bits(f"{name} of {cols} columns on {other.name}", value, expected[name])


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
def test_from_run_to_run(backend: KernelBackend, op: Callable[[KernelBackend, int], Results]) -> None:
    for cols in COLS[2:]:
        expected = op(backend, cols)
        for name, value in op(backend, cols).items():
            same_bits(f"{name} of {cols} columns", value, expected[name])
