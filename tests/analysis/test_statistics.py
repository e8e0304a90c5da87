"""Every statistic, and every spike, against a plain loop over steps."""

import math
import statistics
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_ext.analysis.statistics import (
    AnalysisSettings,
    Spike,
    StepPoint,
    Steps,
    analyze,
    correlation,
    find_spikes,
    loss_ratios,
    measure_summary,
    ratio_table,
    running_median,
)
from megatron_ext.curriculum.guards import LossRatio

Floats = npt.NDArray[np.float64]
losses = hnp.arrays(
    np.float64, st.integers(1, 40), elements=st.floats(0, 20) | st.sampled_from([0.0, math.nan, math.inf, -math.inf])
)


def steps_of(loss: Floats, **variance: Floats) -> Steps:
    step = np.arange(1.0, len(loss) + 1)
    return Steps(step=step, tokens=step * 64, loss=loss, ratio=loss_ratios(loss), variance=variance)


@settings(deadline=None)
@given(losses)
def test_ratios_are_those_of_the_tracker(loss: Floats) -> None:
    tracker = LossRatio()
    np.testing.assert_array_equal(loss_ratios(loss), [tracker.update(value) for value in loss.tolist()])


@settings(deadline=None)
@given(losses, st.sampled_from([1, 3, 5, 11, 99]))
def test_running_median_is_the_median_of_each_window(values: Floats, window: int) -> None:
    finite = [value if math.isfinite(value) else math.inf for value in values.tolist()]
    expected = []
    for index in range(len(finite)):
        half = min(window // 2, index, len(finite) - 1 - index)
        expected.append(statistics.median(finite[index - half : index + half + 1]))
    np.testing.assert_array_equal(running_median(values, window), expected)


@settings(deadline=None)
@given(losses)
def test_threshold_rows_count_and_name_the_steps(loss: Floats) -> None:
    steps = steps_of(loss)
    table = ratio_table(steps, steps.ratio, (1.0, 1.2, 3.0))
    ratios = steps.ratio.tolist()
    assert table.largest == max(ratios)
    assert table.at.step == ratios.index(max(ratios)) + 1
    assert table.at.tokens == table.at.step * 64
    for row in table.rows:
        above = [index + 1 for index, ratio in enumerate(ratios) if ratio > row.threshold]
        assert row.count == len(above)
        assert row.share == pytest.approx(len(above) / len(ratios))
        assert [place and place.step for place in (row.first, row.last)] == (
            [above[0], above[-1]] if above else [None, None]
        )


def test_a_ratio_equal_to_the_threshold_is_not_above_it() -> None:
    steps = steps_of(np.array([1.0, 1.5, 2.0]))
    assert [row.count for row in ratio_table(steps, steps.ratio, (1.5, 2.0)).rows] == [1, 0]


def test_measure_summary() -> None:
    values = np.array([math.nan, 3.0, 1.0, math.nan, math.inf, 2.0])
    summary = measure_summary(steps_of(np.ones(6), l1=values), "l1")
    assert summary is not None
    assert summary.measured == 4
    found = [(reading.value, reading.at.step) for reading in (summary.first, summary.min, summary.max, summary.last)]
    assert found == [(3.0, 2), (1.0, 3), (math.inf, 5), (2.0, 6)]
    assert measure_summary(steps_of(np.ones(6), l1=np.full(6, math.nan)), "l1") is None


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 100), st.none() | st.integers(0, 100)), min_size=1, max_size=30))
def test_correlation_is_pearsons(pairs: list[tuple[int, int | None]]) -> None:
    # A ratio that is not finite is left out, as is a value.
    ratio = np.array([*(float(x) for x, _ in pairs), math.inf])
    values = np.array([*(math.nan if y is None else float(y) for _, y in pairs), 100.0])
    kept = [(x, y) for x, y in pairs if y is not None]
    found = correlation(ratio, values, measure="l1", smoothed=False)
    assert found.n == len(kept)
    if len(kept) < 3 or len({x for x, _ in kept}) == 1 or len({y for _, y in kept}) == 1:
        assert found.r is None
        assert found.p is None
        assert found.undefined
        return
    expected = statistics.correlation([x for x, _ in kept], [y for _, y in kept])
    assert found.undefined is None
    assert found.r == pytest.approx(expected, abs=1e-9)


def test_p_value_of_a_textbook_case() -> None:
    """Anscombe's first set: r = 0.81642, and t = 4.2415 on 9 degrees of freedom, p = 0.00217."""
    x = [10.0, 8, 13, 9, 11, 14, 6, 4, 12, 7, 5]
    y = [8.04, 6.95, 7.58, 8.81, 8.33, 9.96, 7.24, 4.26, 10.84, 4.82, 5.68]
    found = correlation(np.array(x), np.array(y), measure="l1", smoothed=False)
    assert found.r == pytest.approx(0.81642, abs=1e-5)
    assert found.p == pytest.approx(0.00217, abs=1e-5)


@pytest.mark.parametrize(
    ("ratio", "values", "reason"),
    [
        ([1, 2, 3], [math.nan] * 3, "it was never measured"),
        ([1, 2, 3], [1, 2, math.nan], "only 2 of 2 measured steps have finite values, it takes 3"),
        ([1, math.inf, 3, 4], [1, 2, 3, math.inf], "only 2 of 4 measured steps have finite values, it takes 3"),
        ([1, 2, 3], [5, 5, 5 + 1e-15], "l1 has the same value on all 3 steps"),
        ([1, 1, 1], [5, 6, 7], "the loss ratio has the same value on all 3 steps"),
        ([1, 1, 1], [0, 0, 0], "l1 has the same value on all 3 steps"),
    ],
)
def test_an_undefined_correlation_is_explained(ratio: list[float], values: list[float], reason: str) -> None:
    found = correlation(np.array(ratio, dtype=float), np.array(values, dtype=float), measure="l1", smoothed=False)
    assert (found.r, found.p, found.undefined) == (None, None, reason)


def columns(**values: list[float]) -> dict[str, Floats]:
    return {name: np.array(column, dtype=float) for name, column in values.items()}


def test_the_recorded_ratio_counts_and_of_a_step_that_is_there_twice_the_later_line() -> None:
    steps = columns(step=[5, 6, 7], tokens=[50, 60, 70], loss=[2, 3, 4], loss_ratio=[1.4, math.nan, 2.8])
    assert Steps.from_columns(steps, ()).ratio.tolist() == [1.4, 1.5, 2.8]
    twice = columns(step=[1, 2, 3, 2, 3], tokens=[1, 2, 3, 2, 3], loss=[9, 8, 7, 6, 5], l1=[1, 2, 3, 4, 5])
    found = Steps.from_columns({**twice, "loss_ratio": np.ones(5)}, ("l1",))
    assert found.step.tolist() == [1, 2, 3]
    assert found.loss.tolist() == [9, 6, 5]
    assert found.variance["l1"].tolist() == [1, 4, 5]


def test_the_analysis_of_a_whole_run() -> None:
    """60 falling losses with two spikes: one of a step, which smoothing removes, and one of twelve, which it keeps."""
    loss = np.linspace(3, 2, 60)
    loss[20], loss[40:52] = 6.0, 5.0
    variance = np.where(np.arange(60) % 4 == 0, loss * 10, math.nan)
    found = analyze(steps_of(loss, adam_var_l1=variance, adam_var_max=np.full(60, math.nan)), AnalysisSettings())
    assert (found.steps, found.first.step, found.last.tokens, found.missing_steps) == (60, 1, 60 * 64, 0)
    assert [row.count for row in found.ratio.rows] == [13] * 4
    assert [row.count > 0 for row in found.smoothed_ratio.rows] == [True, True, True, True]
    assert found.smoothed_ratio.rows[0].count == 12
    assert [summary.measure for summary in found.variance] == ["adam_var_l1"]
    raw, smooth, *never = found.correlations
    assert (raw.measure, raw.smoothed, smooth.smoothed, raw.n) == ("adam_var_l1", False, True, 15)
    assert raw.r is not None
    assert raw.r > 0.9
    assert [item.undefined for item in never] == ["it was never measured"] * 2
    assert [(spike.start.step, spike.steps) for spike in found.spikes] == [(21, 1), (41, 12)]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_run_of_few_steps(count: int) -> None:
    found = analyze(steps_of(np.full(count, 2.0), l1=np.full(count, 1.0)), AnalysisSettings())
    assert found.ratio.largest == 1.0
    assert found.spikes == ()
    assert all(item.undefined for item in found.correlations)


def test_missing_steps_are_counted() -> None:
    steps = columns(step=[5, 6, 9], tokens=[5, 6, 9], loss=[2, 3, math.nan], loss_ratio=[1, 1.5, math.inf])
    analysis = analyze(Steps.from_columns(steps, ()), AnalysisSettings())
    assert (analysis.missing_steps, analysis.non_finite_losses) == (2, 1)
    assert analysis.ratio.largest == math.inf


def spikes_of(loss: Floats, *, threshold: float = 1.2, merge_gap: int = 2, window: int = 3) -> tuple[Spike, ...]:
    settings = AnalysisSettings(spike_threshold=threshold, merge_gap=merge_gap, window=window)
    return find_spikes(steps_of(loss), running_median(loss, window), settings)


def walk(loss: list[float], *, threshold: float, merge_gap: int, window: int) -> list[tuple[Any, ...]]:
    """(start, end, peak, level, recovered) as indices, step by step."""
    ratios = loss_ratios(np.array(loss)).tolist()
    found: list[list[int]] = []
    for index, ratio in enumerate(ratios):
        if ratio <= threshold:
            continue
        if found and index - found[-1][1] - 1 <= merge_gap:
            found[-1][1] = index
        else:
            found.append([index, index])
    result = []
    for start, end in found:
        before = [value if math.isfinite(value) else math.inf for value in loss[max(0, start - window) : start]]
        level = statistics.median(before) if before else math.inf
        back = None
        if math.isfinite(level):
            back = next((i for i in range(end + 1, len(loss)) if math.isfinite(loss[i]) and loss[i] <= level), None)
        peak = max(range(start, end + 1), key=lambda i: (ratios[i], -i))
        result.append((start, end, peak, level if math.isfinite(level) else None, back))
    return result


@settings(deadline=None)
@given(
    loss=hnp.arrays(np.float64, st.integers(1, 60), elements=st.integers(1, 12).map(float) | st.just(math.nan)),
    merge_gap=st.integers(0, 4),
    window=st.sampled_from([1, 3, 7]),
)
def test_spikes_are_those_of_a_walk(loss: Floats, merge_gap: int, window: int) -> None:
    spikes = spikes_of(loss, merge_gap=merge_gap, window=window)
    expected = walk(loss.tolist(), threshold=1.2, merge_gap=merge_gap, window=window)
    found = [
        (s.start.step - 1, s.end.step - 1, s.peak.step - 1, s.level, s.recovered and s.recovered.step - 1)
        for s in spikes
    ]
    assert found == expected
    for spike in spikes:
        assert spike.steps == spike.end.step - spike.start.step + 1
        back = spike.recovered
        assert spike.recovery_steps == (None if back is None else back.step - spike.start.step)
        assert spike.recovery_tokens == (None if back is None else 64 * (back.step - spike.start.step))


def test_a_loss_that_stays_up_is_not_recovered() -> None:
    losses = np.array([2.0, 2.0, 2.0, *[3.0] * 600, *[2.1] * 5000])
    (spike,) = spikes_of(losses)
    assert (spike.recovered, spike.recovery_steps) == (None, None)
    losses[5000] = 2.0
    (spike,) = spikes_of(losses)
    assert spike.recovered == StepPoint(step=5001, tokens=5001 * 64)


def test_a_file_that_begins_within_a_spike_has_no_level() -> None:
    loss = np.array([3.0, 2.0, 2.0])
    steps = replace(steps_of(loss), ratio=np.array([1.5, 1.0, 1.0]))
    (spike,) = find_spikes(steps, loss, AnalysisSettings())
    assert (spike.level, spike.recovered) == (None, None)
