"""The picture can be drawn of any run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from megatron_ext.analysis.figure import draw_runs, legend_text
from megatron_ext.analysis.run_data import RunData
from tests.analysis.runs import run_data


def run_of(values: list[float], *, label: str = "run", **changes: Any) -> RunData:
    return run_data(label, steps=len(values), loss=values, **changes)


@pytest.mark.parametrize(
    "runs",
    [
        [run_of([5.0])],
        [run_of([math.nan])],
        [run_of([math.inf, 5.0, math.nan, 4.0])],
        [run_of([5.0, 500.0, 4.0], label="spike"), run_of([5.0, 4.0], label="_hidden name")],
        [run_of([5.0, 4.0], label="x" * 200)] * 9,
        [run_of(list(np.linspace(9, 2, 5000)))],
        [run_of([0.0, 0.0], lr=[0.0, 0.0])],
    ],
    ids=["one step", "only nan", "gaps", "spike", "many runs", "long", "zeros"],
)
def test_any_run_is_drawn(runs: list[RunData], tmp_path: Path) -> None:
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
