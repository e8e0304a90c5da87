"""The numbers behind the picture, and that it can be drawn."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from megatron_ext.metrics.curves import Curves, curves_of, smooth
from megatron_ext.metrics.figure import draw_runs, legend_text
from megatron_ext.metrics.jsonl import Metrics
from megatron_ext.metrics.records import EvalRecord, EventRecord
from tests.metrics.test_records import train_record

losses = st.lists(st.floats(0.0, 20.0) | st.just(math.nan) | st.just(math.inf), min_size=1, max_size=80)


def run_of(values: list[float], *, label: str = "run", **changes: Any) -> Curves:
    train = tuple(
        train_record(step=step, tokens=step * 64, loss=loss, step_time_s=0.5, **changes)
        for step, loss in enumerate(values, start=1)
    )
    return curves_of(Metrics(train, (), ()), label)


def test_validations_and_resumes_stand_at_their_step() -> None:
    metrics = Metrics(
        train=tuple(train_record(step=step, tokens=step * 64, step_time_s=0.5) for step in (1, 2, 3)),
        evaluations=tuple(EvalRecord.from_loss(step=step, tokens=step * 64, loss=2.0) for step in (0, 2)),
        events=(EventRecord("resume", {"step": 1}), EventRecord("checkpoint", {"step": 2}), EventRecord("resume")),
    )
    curves = curves_of(metrics, "run")
    assert curves.seconds.tolist() == [0.5, 1.0, 1.5]
    assert curves.valid_seconds.tolist() == [0.0, 1.0]
    assert curves.valid_tokens.tolist() == [0.0, 128.0]
    assert curves.resume_tokens.tolist() == [64.0]


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


@pytest.mark.parametrize(
    "runs",
    [
        [run_of([5.0])],
        [run_of([math.nan])],
        [run_of([math.inf, 5.0, math.nan, 4.0])],
        [run_of([5.0, 500.0, 4.0], label="spike"), run_of([5.0, 4.0], label="_hidden name")],
        [run_of([5.0, 4.0], label="x" * 200)] * 9,
        [run_of(list(np.linspace(9, 2, 5000)))],
        [run_of([0.0, 0.0], lr=0.0)],
    ],
    ids=["one step", "only nan", "gaps", "spike", "many runs", "long", "zeros"],
)
def test_any_run_is_drawn(runs: list[Curves], tmp_path: Path) -> None:
    draw_runs(runs, tmp_path / "report.png")
    image = imread(tmp_path / "report.png")
    assert image.shape[0] > 800
    assert image.shape[1] > 1200
    assert image.std() > 0.01


@pytest.mark.parametrize(
    ("label", "text"),
    [("slw", "slw"), ("_run", " _run"), ("a$b$", r"a\$b\$"), ("x" * 200, "…" + "x" * 59)],
)
def test_labels_are_shown_as_they_are(label: str, text: str) -> None:
    assert legend_text(label) == text
