"""Recent speed and time left."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.metrics.rate import TokenRate, format_count, format_duration


def rate_of(steps: list[tuple[float, float]]) -> TokenRate:
    rate = TokenRate()
    for tokens, seconds in steps:
        rate.add(tokens=tokens, seconds=seconds)
    return rate


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 100.0)), min_size=1, max_size=50))
def test_rate_lies_between_the_slowest_and_the_fastest_step(steps: list[tuple[float, float]]) -> None:
    rate = rate_of(steps).tokens_per_s
    assert rate is not None
    speeds = [tokens / seconds for tokens, seconds in steps]
    assert min(speeds) * (1 - 1e-9) <= rate <= max(speeds) * (1 + 1e-9)


@given(speed=st.floats(1.0, 1e6), lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_growing_steps_at_one_speed_have_that_speed(speed: float, lengths: list[int]) -> None:
    rate = rate_of([(length * 8, length * 8 / speed) for length in sorted(lengths)])
    assert rate.tokens_per_s == pytest.approx(speed)
    assert rate.seconds_left(1000) == pytest.approx(1000 / speed)


def test_old_speed_is_forgotten() -> None:
    slow_then_fast = rate_of([(100.0, 1.0)] * 100 + [(1000.0, 1.0)] * 300)
    assert slow_then_fast.tokens_per_s == pytest.approx(1000.0, rel=1e-2)


def test_one_slow_step_does_not_become_the_rate() -> None:
    rate = rate_of([(1000.0, 10.0)] * 20 + [(1000.0, 60.0)])
    assert rate.tokens_per_s is not None
    assert 50 < rate.tokens_per_s < 100


def test_nothing_is_known_before_the_first_step() -> None:
    assert TokenRate().tokens_per_s is None
    assert TokenRate().seconds_left(10) is None
    assert rate_of([(10.0, 1.0)]).seconds_left(-5) == 0.0


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (1.234, "1.23"), (950, "950"), (12_345, "12.35K"), (999_960, "1M"), (3e6, "3M"), (157.2864e9, "157.3B")],
)
def test_counts_for_people(number: float, text: str) -> None:
    assert format_count(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.4, "0:00"), (59.7, "1:00"), (3723, "1:02:03"), (3 * 86400 + 4 * 3600 + 300, "3d 04:05")],
)
def test_durations_for_people(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text
