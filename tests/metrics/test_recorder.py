"""The recorder and the sinks it is given."""

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ext.config.training import MetricsConfig
from megatron_ext.metrics.console import LogLines, ProgressBar
from megatron_ext.metrics.jsonl import read_metrics
from megatron_ext.metrics.recorder import Recorder, Sink, open_sinks
from megatron_ext.metrics.records import EvalRecord
from tests.metrics.test_records import train_record


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


def test_a_terminal_gets_a_bar_and_anything_else_lines(tmp_path: Path) -> None:
    for terminal, kind in ((True, ProgressBar), (False, LogLines)):
        sinks = sinks_of(tmp_path, terminal=terminal)
        assert [type(sink) for sink in sinks if isinstance(sink, ProgressBar | LogLines)] == [kind]
        Recorder(sinks).close()


def test_without_sinks_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    record_steps(recorder, 1, 2)
    recorder.event("checkpoint", step=2)
    recorder.close()
    assert list(tmp_path.iterdir()) == []
