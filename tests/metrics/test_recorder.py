"""The recorder and the sinks it is given; what they do when a run rolls back."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ext.config.training import MetricsConfig
from megatron_ext.metrics.jsonl import ROLLED_BACK_NAME
from megatron_ext.metrics.progress_bar import ProgressBar
from megatron_ext.metrics.reading import read_metrics
from megatron_ext.metrics.recorder import Recorder, Sink, open_sinks
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.runtime.log import LOGGER, configure_logging
from tests.metrics.test_records import train_record


@pytest.fixture
def fresh_log() -> Iterator[None]:
    """Gives the package's logger back as it was."""
    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    yield
    for handler in LOGGER.handlers:
        handler.close()
    LOGGER.handlers, LOGGER.level, LOGGER.propagate = before


def sinks_of(run_dir: Path, *, terminal: bool = False, tensorboard: bool = False, step: int = 0) -> list[Sink]:
    return open_sinks(
        run_dir,
        MetricsConfig(tensorboard=tensorboard, log_every=2),
        total_tokens=640,
        step=step,
        tokens=step * 64,
        console=Console(file=io.StringIO(), force_terminal=terminal),
    )


def record_steps(recorder: Recorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        recorder.train(train_record(step=step, tokens=step * 64))
    recorder.evaluation(EvalRecord.from_loss(step=last, tokens=last * 64, loss=2.0))


def test_every_sink_gets_every_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        recorder = Recorder(sinks_of(tmp_path, tensorboard=True))
        record_steps(recorder, 1, 4)
        recorder.event("checkpoint", step=4)
        recorder.close()
    metrics = read_metrics(tmp_path)
    assert [record.step for record in metrics.train] == [1, 2, 3, 4]
    assert [record.step for record in metrics.evaluations] == [4]
    assert metrics.events[0].details == {"step": 4}
    assert [line.split(" |")[0] for line in caplog.messages if line.startswith("step")] == ["step 2", "step 4"]
    assert all(any((tmp_path / "tensorboard" / axis).iterdir()) for axis in ("by_step", "by_tokens"))


def test_opening_at_a_step_drops_what_came_after(tmp_path: Path) -> None:
    for step in (0, 2, 0):
        recorder = Recorder(sinks_of(tmp_path, step=step))
        assert [record.step for record in read_metrics(tmp_path).train] == list(range(1, step + 1))
        recorder.event("resume", step=step)
        record_steps(recorder, step + 1, 4)
        recorder.close()
    metrics = read_metrics(tmp_path)
    assert [record.step for record in metrics.train] == [1, 2, 3, 4]
    assert [event.details["step"] for event in metrics.events] == [0, 2, 0]


@pytest.mark.usefixtures("fresh_log")
def test_a_terminal_gets_a_bar_and_the_log_file_lines_in_any_case(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for terminal in (True, False):
        log = tmp_path / f"{terminal}.txt"
        configure_logging(0, log_file=log)
        sinks = sinks_of(tmp_path, terminal=terminal)
        assert any(isinstance(sink, ProgressBar) for sink in sinks) == terminal
        recorder = Recorder(sinks)
        record_steps(recorder, 1, 4)
        recorder.close()
        shown, kept = capsys.readouterr().err, log.read_text()
        assert ("step 4 |" in shown) == (not terminal)
        for line in ("step 2 |", "step 4 |", "validation after step 4"):
            assert line in kept


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_are_taken_back_and_kept_aside(tmp_path: Path, terminal: bool) -> None:
    recorder = Recorder(sinks_of(tmp_path, terminal=terminal, tensorboard=True))
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
