"""What sinks do when a run rolls back."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from megatron_ext.config.training import MetricsConfig
from megatron_ext.metrics.jsonl import ROLLED_BACK_NAME, read_metrics
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.records import EvalRecord
from tests.metrics.test_records import train_record


def recorder_of(run: Path, *, terminal: bool) -> Recorder:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    config = MetricsConfig(tensorboard=True)
    return Recorder(open_sinks(run, config, total_tokens=640, step=0, tokens=0, console=console))


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_are_taken_back_and_kept_aside(tmp_path: Path, terminal: bool) -> None:
    recorder = recorder_of(tmp_path, terminal=terminal)
    for loss, first in ((4.0, 1), (3.0, 3)):
        for step in range(first, 5):
            recorder.train(train_record(step=step, tokens=step * 64, loss=loss))
        recorder.evaluation(EvalRecord.from_loss(step=4, tokens=256, loss=loss))
        recorder.event("guard", step=4)
        recorder.roll_back(step=2, tokens=128)
        assert [record.step for record in read_metrics(tmp_path).train] == [1, 2]
    for step in (3, 4):
        recorder.train(train_record(step=step, tokens=step * 64, loss=1.0))
    recorder.close()
    metrics = read_metrics(tmp_path)
    assert [record.loss for record in metrics.train if record.step > 2] == [1.0, 1.0]
    assert metrics.evaluations == ()
    assert [event.name for event in metrics.events] == ["guard", "guard"], "events did happen"
    aside = [json.loads(line) for line in (tmp_path / ROLLED_BACK_NAME).read_text().splitlines()]
    assert [(line["kind"], line["step"], line["loss"]) for line in aside[:3]] == [
        ("train", 3, 4.0),
        ("train", 4, 4.0),
        ("eval", 4, 4.0),
    ]


def test_tensorboard_shows_the_steps_that_counted(tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, terminal=False)
    for step in range(1, 5):
        recorder.train(train_record(step=step, tokens=step * 64, loss=4.0))
    recorder.roll_back(step=2, tokens=128)
    recorder.train(train_record(step=3, tokens=192, loss=1.0))
    recorder.close()
    for axis, unit in (("by_step", 1), ("by_tokens", 64)):
        shown = EventAccumulator(str(tmp_path / "tensorboard" / axis))
        shown.Reload()
        points = [(point.step // unit, point.value) for point in shown.Scalars("train/loss")]
        assert points == [(1, 4.0), (2, 4.0), (3, 1.0)]
