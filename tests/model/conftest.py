"""One rank's groups for the tests of a module."""

from collections.abc import Iterator

import pytest

from megatron_ext.parallel.groups import Layout, initialize_parallel
from tests.ranks import single_rank


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Groups of one rank."""
    with single_rank():
        yield initialize_parallel(1, 5.0)
