"""The fixture ``backend``: every machine that can run a kernel; one that cannot be had skips with the reason."""

from functools import cache

import pytest

from tests.kernels.backends import BACKENDS, MARKS, KernelBackend
from tests.kernels.building import CannotBuildError
from tests.kernels.thinning import mark_slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves for `make test` what its time allows."""
    mark_slow(items)


@cache
def _backend(name: str) -> KernelBackend | str:
    try:
        return BACKENDS[name]()
    except CannotBuildError as missing:
        return str(missing)


@pytest.fixture(params=[pytest.param(name, marks=MARKS.get(name, ())) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> KernelBackend:
    """A machine that runs kernels."""
    found = _backend(request.param)
    if isinstance(found, str):
        pytest.skip(found)
    return found
