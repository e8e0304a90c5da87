"""tune.json."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.experiments.tune import FILE_NAME, ProbeResult, read_results, write_results
from megatron_ext.experiments.tune_search import Candidate, Point, Verdict

numbers = st.floats(min_value=0) | st.just(math.nan)
results = st.builds(
    ProbeResult,
    candidate=st.builds(Candidate, start=st.integers(1, 999), duration=st.integers(1, 10**6)),
    verdict=st.builds(
        Verdict,
        fluctuated_at=st.none() | st.integers(1, 10**6),
        worst_ratio=st.floats(min_value=0),
        tokens=st.integers(0, 10**12),
    ),
    points=st.lists(st.builds(Point, step=st.integers(1, 10**6), perplexity=numbers), max_size=4).map(tuple),
)


@given(st.lists(results, max_size=4))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, found: list[ProbeResult]) -> None:
    folder = tmp_path_factory.mktemp("state")
    written = {result.candidate: result for result in found}
    identity = {"settings": {"split": (1, 2)}}
    write_results(folder, identity, written)
    json.loads((folder / FILE_NAME).read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    # NaN differs from itself, so texts are compared.
    assert repr(read_results(folder, identity)) == repr(written)


def test_nothing_there_is_nothing_found(tmp_path: Path) -> None:
    assert read_results(tmp_path, {}) == {}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1, "probes": [{}], "identity": {}}', '{"format": 9}'])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=FILE_NAME):
        read_results(tmp_path, {})
