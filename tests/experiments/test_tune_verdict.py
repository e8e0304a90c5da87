"""The criterion."""

import math

from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.experiments.tune_search import Point, verdict_of

CRITERION = {"threshold": 1.3, "initial": 100.0, "tokens": 7}


def points(*perplexities: float) -> list[Point]:
    return [Point(10 * number, value) for number, value in enumerate(perplexities, start=1)]


def test_falling_and_slightly_rising_perplexity_is_stable() -> None:
    verdict = verdict_of(points(90.0, 50.0, 64.0, 40.0), **CRITERION)  # type: ignore[arg-type]
    assert verdict.stable
    assert verdict.worst_ratio == 64.0 / 50.0
    assert verdict.tokens == 7


def test_the_first_significant_rise_over_the_best_so_far_counts() -> None:
    verdict = verdict_of(points(50.0, 60.0, 66.0, 10.0, 99.0), **CRITERION)  # type: ignore[arg-type]
    assert verdict.fluctuated_at == 30
    assert verdict.worst_ratio == 9.9


def test_exactly_the_threshold_is_not_above_it() -> None:
    assert verdict_of(points(50.0, 75.0), threshold=1.5, initial=100.0, tokens=0).stable


def test_an_explosion_before_the_first_validation_is_found() -> None:
    assert verdict_of(points(500.0, 90.0, 80.0), **CRITERION).fluctuated_at == 10  # type: ignore[arg-type]


def test_what_is_not_finite_is_a_fluctuation() -> None:
    for value in (math.nan, math.inf):
        verdict = verdict_of(points(50.0, value, 40.0), **CRITERION)  # type: ignore[arg-type]
        assert verdict.fluctuated_at == 20
        assert verdict.worst_ratio == math.inf
    broken = verdict_of(points(50.0, 40.0), **CRITERION, broken_steps=[13, 14])  # type: ignore[arg-type]
    assert broken.fluctuated_at == 13
    assert not math.isfinite(broken.worst_ratio)


@given(st.lists(st.floats(1.0, 1e6), max_size=20), st.floats(1.01, 5.0))
def test_stable_means_no_value_above_threshold_times_any_earlier_one(values: list[float], threshold: float) -> None:
    verdict = verdict_of(points(*values), threshold=threshold, initial=1e3, tokens=0)
    rises = [10 * (index + 1) for index, value in enumerate(values) if value / min([1e3, *values[:index]]) > threshold]
    assert verdict.fluctuated_at == (rises[0] if rises else None)


def test_no_validation_yet_is_no_fluctuation() -> None:
    assert verdict_of([], **CRITERION).stable  # type: ignore[arg-type]
