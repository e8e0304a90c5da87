"""Position buckets and the prefix."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.metrics.positions import bucket_edges, bucket_means, prefix_length
from tests.engine.training import small_config


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [
        (1, (0, 1)),
        (8, (0, 8)),
        (9, (0, 8, 9)),
        (32, (0, 8, 16, 32)),
        (1000, (0, 8, 16, 32, 64, 128, 256, 512, 1000)),
        (1024, (0, 8, 16, 32, 64, 128, 256, 512, 1024)),
    ],
)
def test_edges_double_up_to_the_length(seq_len: int, edges: tuple[int, ...]) -> None:
    assert bucket_edges(seq_len) == edges


@given(st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_bucket_means_are_means_and_average_to_the_loss(losses: list[float]) -> None:
    edges = bucket_edges(len(losses))
    means = bucket_means(np.array(losses), edges)
    spans = list(pairwise(edges))
    assert means == pytest.approx([sum(losses[first:end]) / (end - first) for first, end in spans])
    weighted = sum(mean * (end - first) for mean, (first, end) in zip(means, spans, strict=True))
    assert weighted / len(losses) == pytest.approx(np.mean(losses))


def test_the_prefix_is_the_first_length_unless_it_is_given() -> None:
    for prefix, expected in ((None, 8), (0, 0), (24, 24)):
        config = small_config(metrics={"prefix": prefix})
        assert prefix_length(config, config.plan()) == expected


def test_a_prefix_beyond_the_full_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics\.prefix is 33, more than training\.seq_len 32: write at most 32"):
        small_config(metrics={"prefix": 33})
