"""Settings every test shares: the CPU accelerator unless the caller chose another, one thread, no deadlines."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A deadline for an example is a timed test: it fails where the machine is busy.
settings.register_profile("project", deadline=None)
settings.load_profile("project")


@pytest.fixture(scope="session")
def fused() -> None:
    """The fused kernels for the CPU, loaded into this process; compiled into the cache at the first use."""
    from megatron_ext.ops.building.toolchain import KernelsUnavailableError
    from megatron_ext.ops.loading import load_operators

    try:
        load_operators("cpu")
    except KernelsUnavailableError as error:
        pytest.skip(f"no fused kernels here: {error}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that need a private cluster: those that use one of the fixtures that start it."""
    for item in items:
        if {"lab", "cluster"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.cluster)
