"""Spikes against a plain walk over the steps."""

import math
import statistics
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from megatron_ext.analysis.spikes import Spike, StepPoint, find_spikes
from megatron_ext.analysis.statistics import loss_ratios, running_median

Floats = npt.NDArray[np.float64]


def spikes_of(loss: Floats, *, threshold: float = 1.2, merge_gap: int = 2, window: int = 3) -> tuple[Spike, ...]:
    return find_spikes(
        loss_ratios(loss),
        loss,
        running_median(loss, window),
        place=lambda index: StepPoint(step=index + 1, tokens=10 * (index + 1)),
        threshold=threshold,
        merge_gap=merge_gap,
        window=window,
    )


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
        assert spike.recovery_tokens == (None if back is None else 10 * (back.step - spike.start.step))


def test_a_spike_and_its_way_back() -> None:
    loss = np.array([2.0, 2.0, 2.0, 5.0, 4.0, 2.3, 2.1, 2.0, 1.9])
    (spike,) = spikes_of(loss)
    assert (spike.start.step, spike.end.step, spike.steps) == (4, 5, 2)
    assert (spike.peak.step, spike.peak_ratio, spike.level) == (4, 2.5, 2.0)
    assert spike.recovered == StepPoint(step=8, tokens=80)
    assert (spike.recovery_steps, spike.recovery_tokens) == (4, 40)


def test_a_loss_that_stays_up_is_not_recovered() -> None:
    losses = np.array([2.0, 2.0, 2.0, *[3.0] * 600, *[2.1] * 5000])
    (spike,) = spikes_of(losses)
    assert (spike.recovered, spike.recovery_steps) == (None, None)
    losses[5000] = 2.0
    (spike,) = spikes_of(losses)
    assert spike.recovered == StepPoint(step=5001, tokens=50_010)


def test_close_spikes_are_one_and_distant_ones_are_two() -> None:
    loss = np.array([2.0, 2.0, 2.0, 3.0, 2.0, 2.0, 4.0, 2.0, 2.0])
    (merged,) = spikes_of(loss, merge_gap=2)
    assert (merged.start.step, merged.end.step, merged.steps, merged.peak_ratio) == (4, 7, 4, 2.0)
    assert merged.recovered == StepPoint(step=8, tokens=80)
    assert [spike.steps for spike in spikes_of(loss, merge_gap=1)] == [1, 1]


def test_a_file_that_begins_within_a_spike_has_no_level() -> None:
    loss = np.array([3.0, 2.0, 2.0])
    (spike,) = find_spikes(
        np.array([1.5, 1.0, 1.0]), loss, loss,
        place=lambda index: StepPoint(index, index), threshold=1.2, merge_gap=0, window=1,
    )  # fmt: skip
    assert (spike.level, spike.recovered) == (None, None)
