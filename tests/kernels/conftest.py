"""The fixture ``backend``, a machine that can run kernels, and which machines run which tests in `make test`.

The sources for a CPU run every test on ``cpu-serial``, those for a GPU on ``emulator-forward`` and on a device. The
other machines run what a module names in ``EVERYWHERE``: for a test over a grid, the points (values of its parameters)
that lead through every path of its kernels once. The PTX of sm_90, whose arithmetic is not g++'s, and the CPU with
threads also run the tests that have no grid. The rest is slow.
"""

from collections.abc import Mapping, Sequence
from functools import cache

import pytest

from tests.kernels.backends import BACKENDS, KernelBackend
from tests.kernels.building import CannotBuildError

Everywhere = Mapping[str, Sequence[tuple[object, ...]]]

_EVERYTHING = frozenset({"cpu-serial", "emulator-forward", "cuda"})
_WITHOUT_GRID = frozenset({"cpu-threads", "ptx-90"})
_NOTHING = frozenset({"ptx-80", "ptx-100"})


def is_slow(everywhere: Everywhere, test: str, parameters: Mapping[str, object]) -> bool:
    """Whether a test with these parameters, ``backend`` among them, is left out of `make test`."""
    backend, values = parameters["backend"], list(parameters.values())
    if backend in _EVERYTHING:
        return False
    if backend in _NOTHING:
        return True
    if test not in everywhere:
        return backend not in _WITHOUT_GRID
    return not any(all(value in values for value in point) for point in everywhere[test])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if "backend" in parameters:
            everywhere = getattr(getattr(item, "module", None), "EVERYWHERE", {})
            if is_slow(everywhere, getattr(item, "originalname", item.name), parameters):
                item.add_marker(pytest.mark.slow)


@cache
def _backend(name: str) -> KernelBackend | str:
    try:
        return BACKENDS[name]()
    except CannotBuildError as missing:
        return str(missing)


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.gpu if name == "cuda" else ()) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> KernelBackend:
    """A machine that runs kernels; one that cannot be had skips with the reason."""
    found = _backend(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found
