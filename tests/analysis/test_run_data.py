"""Reading runs as columns, and thinning curves without losing what matters."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.analysis.run_data import read_run, sampled, smooth, thin
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.records import EvalRecord, EventRecord
from tests.metrics.test_records import train_record

values = st.lists(st.floats(-1e6, 1e6) | st.just(np.nan) | st.just(np.inf) | st.just(1.0), max_size=300)
losses = st.lists(st.floats(0.0, 20.0) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=80)


@given(losses, st.integers(0, 20))
def test_smoothing_stays_within_the_window(values: list[float], half_width: int) -> None:
    result = smooth(np.array(values), half_width=half_width)
    for index, value in enumerate(values):
        if not math.isfinite(value):
            assert math.isnan(result[index])
            continue
        window = [item for item in values[max(0, index - half_width) : index + half_width + 1] if math.isfinite(item)]
        assert min(window) - 1e-9 <= result[index] <= max(window) + 1e-9


def test_smoothing_does_not_lag() -> None:
    falling = np.linspace(10.0, 2.0, 101)
    np.testing.assert_allclose(smooth(falling, half_width=10), falling, atol=1e-12)
    np.testing.assert_allclose(smooth(falling, half_width=0), falling, atol=1e-12)


def test_smoothing_spreads_a_spike_over_its_neighbors() -> None:
    values = np.zeros(21)
    values[10] = 9.0
    assert smooth(values, half_width=2)[7:14].tolist() == pytest.approx([0, 1, 2, 3, 2, 1, 0])


@given(values, st.integers(1, 40))
def test_thinning_keeps_points_of_the_curve_and_each_columns_extremes(y: list[float], bins: int) -> None:
    rng = np.random.default_rng(len(y))
    x = np.cumsum(rng.integers(1, 9, len(y))).astype(np.float64)
    array = np.array(y, dtype=np.float64)
    kept_x, kept_y = thin(x, array, bins)
    finite = np.isfinite(array)
    assert len(kept_x) <= 2 * bins + 2
    assert (np.diff(kept_x) > 0).all()
    assert set(zip(kept_x, kept_y, strict=True)) <= set(zip(x[finite], array[finite], strict=True))
    if not finite.any():
        return
    assert (kept_x[0], kept_x[-1]) == (x[finite][0], x[finite][-1])
    assert (kept_y.min(), kept_y.max()) == (array[finite].min(), array[finite].max())
    width = (x[finite][-1] - x[finite][0]) / bins
    for at, value in zip(x[finite], array[finite], strict=True):
        near = kept_y[np.abs(kept_x - at) <= width] if len(kept_x) < finite.sum() else kept_y
        # Of equal values only the ends may be kept, further off.
        assert near.size == 0 or value <= near.max() or value in kept_y


def test_a_staircase_keeps_both_ends_of_each_step() -> None:
    x, y = thin(np.arange(400.0), np.repeat([0.0, 8.0, 16.0, 24.0], 100), 50)
    assert x.tolist() == [0, 99, 100, 199, 200, 299, 300, 399]
    assert y.tolist() == [0, 0, 8, 8, 16, 16, 24, 24]


def test_sampling_takes_points_of_the_curve_evenly() -> None:
    x, y = sampled(np.arange(1001.0), np.arange(1001.0) * 2, 11)
    assert x.tolist() == [100.0 * n for n in range(11)]
    assert (y == 2 * x).all()
    assert sampled(np.arange(3.0), np.array([1.0, np.nan, 2.0]), 10)[0].tolist() == [0.0, 2.0]


def test_validations_and_resumes_stand_at_their_step(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.evaluation(EvalRecord.from_loss(step=0, tokens=0, loss=9.0))
    for step in (1, 2, 3):
        sink.train(train_record(step=step, tokens=64 * step, step_time_s=0.5, grad_norm=None, peak_memory_bytes=2**29))
    sink.evaluation(EvalRecord.from_loss(step=2, tokens=128, loss=4.0))
    for event in (EventRecord("resume", {"step": 1}), EventRecord("checkpoint", {"step": 2}), EventRecord("resume")):
        sink.event(event)
    sink.close()
    run = read_run(tmp_path, label="name")
    assert (run.label, run.group) == ("name", "name")
    assert run.train["seconds"].tolist() == [0.5, 1.0, 1.5]
    assert np.isnan(run.train["grad_norm"]).all()
    assert run.train["peak_memory_gib"].tolist() == [0.5, 0.5, 0.5]
    assert run.valid["seconds"].tolist() == [0.0, 1.0]
    assert run.valid["loss"].tolist() == [9.0, 4.0]
    assert run.resume_tokens.tolist() == [64.0]
