"""The lab that the tests of this folder share: three hosts, without SLURM."""

from collections.abc import Iterator

import pytest

from tests.cluster.lab import Lab, LabOptions, why_not


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running lab of three hosts, n1 to n3; skips where this machine cannot have one."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab(LabOptions(hosts=3)) as running:
        yield running
