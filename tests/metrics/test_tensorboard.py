"""TensorBoard files, read back with TensorBoard's own reader."""

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import EvalRecord, EventRecord
from megatron_ext.metrics.tensorboard import TensorBoardSink
from tests.metrics.test_records import train_record


def points(directory: Path, tag: str) -> list[tuple[int, float]]:
    """Of a curve; none where there is no such curve."""
    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    curves = accumulator.Tags()["scalars"]
    return [(event.step, event.value) for event in accumulator.Scalars(tag)] if tag in curves else []


def write_steps(directory: Path, *, done: int, last: int, loss: float) -> None:
    sink = TensorBoardSink(directory, step=done, tokens=done * 100)
    for step in range(done + 1, last + 1):
        sink.train(train_record(step=step, tokens=step * 100, loss=loss, grad_norm=None))
    sink.evaluation(EvalRecord.from_loss(step=last, tokens=last * 100, loss=0.0))
    sink.event(EventRecord("checkpoint", {"step": last}))
    sink.close()


def test_points_against_steps_and_tokens(tmp_path: Path) -> None:
    write_steps(tmp_path, done=0, last=3, loss=2.5)
    assert points(tmp_path / "by_step", "train/loss") == [(1, 2.5), (2, 2.5), (3, 2.5)]
    assert points(tmp_path / "by_tokens", "train/loss") == [(100, 2.5), (200, 2.5), (300, 2.5)]
    assert points(tmp_path / "by_tokens", "schedule/sequence_length") == [(100, 8.0), (200, 8.0), (300, 8.0)]
    assert points(tmp_path / "by_step", "validation/perplexity") == [(3, 1.0)]
    for unknown in ("train/grad_norm", "speed/mfu", "train/adam_var_max"):
        assert points(tmp_path / "by_step", unknown) == []


def test_resuming_purges_what_came_after(tmp_path: Path) -> None:
    write_steps(tmp_path, done=0, last=4, loss=2.5)
    write_steps(tmp_path, done=2, last=3, loss=1.5)
    assert points(tmp_path / "by_step", "train/loss") == [(1, 2.5), (2, 2.5), (3, 1.5)]
    assert points(tmp_path / "by_tokens", "train/loss") == [(100, 2.5), (200, 2.5), (300, 1.5)]


def test_a_roll_back_takes_back_what_came_after(tmp_path: Path) -> None:
    sink = TensorBoardSink(tmp_path, step=0, tokens=0)
    for step, loss in ((1, 4.0), (2, 4.0), (3, 4.0), (4, 4.0), (3, 1.0)):
        if loss == 1.0:
            sink.roll_back(step=2, tokens=200)
        sink.train(train_record(step=step, tokens=step * 100, loss=loss))
    sink.close()
    assert points(tmp_path / "by_step", "train/loss") == [(1, 4.0), (2, 4.0), (3, 1.0)]
    assert points(tmp_path / "by_tokens", "train/loss") == [(100, 4.0), (200, 4.0), (300, 1.0)]


def test_without_the_package_the_setting_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.record_writer", None)
    with pytest.raises(UserError, match=r"metrics\.tensorboard is true"):
        TensorBoardSink(tmp_path, step=0, tokens=0)
