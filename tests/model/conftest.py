"""One rank's groups for the tests of a module."""

from collections.abc import Iterator

import pytest

from megatron_ext.parallel.groups import Layout, single_rank_layout


@pytest.fixture(scope="module")
def layout() -> Iterator[Layout]:
    """Groups of one rank."""
    with single_rank_layout() as layout:
        yield layout
