"""The lab that the tests of this folder share: three hosts, without SLURM."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.lab import Lab, LabOptions, why_not
from tests.train.small_run import write_corpus


@pytest.fixture(scope="session")
def lab() -> Iterator[Lab]:
    """A running lab of three hosts, n1 to n3; skips where this machine cannot have one."""
    if reason := why_not():
        pytest.skip(reason)
    with Lab(LabOptions(hosts=3)) as running:
        yield running


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with token files and tokenizer of the small run."""
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder)
    return folder
