"""Every system call that a run's records make fails once, and all of them from some call on."""

import errno
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from megatron_ext.config.training import MetricsConfig
from megatron_ext.errors import UserError
from megatron_ext.metrics import waiting
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.reading import read_metrics
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.records import FILE_NAME
from megatron_ext.runtime.log import LOGGER, configure_logging
from tests.faults import build_faults, environment, no_faults, set_faults
from tests.metrics.test_records import train_record
from tests.metrics.test_tensorboard import points

STEPS = 6
FOREVER = 1 << 40


def open_recorder(run_dir: Path) -> Recorder:
    """What rank 0 has, its log included."""
    configure_logging(0, log_file=run_dir / "log.txt")
    console = Console(file=io.StringIO())
    config = MetricsConfig(tensorboard=True, log_every=1)
    return Recorder(open_sinks(run_dir, config, total_tokens=640, step=0, tokens=0, console=console))


def record(recorder: Recorder, first: int, last: int) -> None:
    for step in range(first, last + 1):
        recorder.train(train_record(step=step, tokens=step * 64))
    recorder.event("checkpoint", step=last)


def try_run(run_dir: Path, *, first: int, last: int, error: int, room_again: bool) -> dict[str, object]:
    """What is left of a run whose calls from the ``first`` to the ``last`` after its start fail."""
    recorder = open_recorder(run_dir)
    set_faults(run_dir, first=first, last=last, error=error)
    record(recorder, 1, STEPS // 2)
    if room_again:
        no_faults()
    record(recorder, STEPS // 2 + 1, STEPS)
    lacks = recorder.close()
    count = no_faults()
    lines = [line for line in (run_dir / FILE_NAME).read_text().splitlines(keepends=True) if line.endswith("\n")]
    curve = points(run_dir / "tensorboard" / "by_step", "train/loss") if not lacks else []
    return {
        "calls": count,
        "steps": [value["step"] for value in map(json.loads, lines) if value["kind"] == "train"],
        "lines": len(lines),
        "lacks": lacks,
        "curve": [step for step, _ in curve],
    }


def scenario(folder: Path) -> None:
    """Every call in turn; run in a process of its own that has the library of faults."""
    everything = try_run(folder / "whole", first=FOREVER, last=FOREVER, error=0, room_again=False)
    calls, whole = everything["calls"], list(range(1, STEPS + 1))
    assert isinstance(calls, int)
    assert calls > 2 * STEPS, "records and log are written at once"
    for error, every in ((errno.ENOSPC, 1), (errno.EIO, 7), (errno.EROFS, 9)):
        for first in range(1, calls + 1, every):
            place = folder / f"{error}-{first}"
            once = try_run(place / "once", first=first, last=first, error=error, room_again=False)
            assert once["steps"] == whole, (first, once)
            if first < calls:  # the last ones force to disk and close: what fails there has no second try
                assert once["lacks"] is None or "forced to disk" in str(once["lacks"]), (first, once)
            again = try_run(place / "again", first=first, last=FOREVER, error=error, room_again=True)
            assert (again["steps"], again["lacks"], again["curve"]) == (whole, None, whole), (first, again)
            full = try_run(place / "full", first=first, last=FOREVER, error=error, room_again=False)
            assert full["lacks"], (first, full)
            missing = STEPS + 2 - int(str(full["lines"]))
            assert not missing or f"lacks {missing} line(s)" in str(full["lacks"]), (first, full)


def test_every_call_fails_in_turn_and_no_record_is_lost(tmp_path: Path) -> None:
    library = build_faults(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "tests.metrics.test_disk_faults", str(tmp_path)],
        env=environment(library) | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


class FullDisk(io.FileIO):
    """A file that takes ``room`` bytes more."""

    room = 0

    def write(self, data: bytes, /) -> int:  # type: ignore[override]
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = super().write(data[: self.room])
        self.room -= written
        return written


@contextmanager
def sink_on_full_disk(path: Path) -> Iterator[tuple[JsonlSink, FullDisk]]:
    sink = JsonlSink(path)
    sink._file.close()
    file = FullDisk(path, "ab")
    sink._file = file
    yield sink, file


@pytest.mark.parametrize("room", [0, 1, 100])
def test_lines_wait_in_order_and_are_written_when_there_is_room(
    tmp_path: Path, room: int, caplog: pytest.LogCaptureFixture
) -> None:
    with sink_on_full_disk(tmp_path / FILE_NAME) as (sink, file), caplog.at_level(logging.INFO):
        file.room = room
        for step in range(1, 5):
            sink.train(train_record(step=step))
        assert len(caplog.messages) == 1
        assert f"{tmp_path / FILE_NAME} cannot be written (No space left on device)" in caplog.messages[0]
        file.room = 1 << 20
        sink.train(train_record(step=5))
        assert sink.close() is None
    assert [record.step for record in read_metrics(tmp_path).train] == [1, 2, 3, 4, 5]
    assert "4 lines that had waited are there" in caplog.messages[1]


def test_what_waits_is_bounded_and_what_is_lost_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_MOST_LINES", 3)
    with sink_on_full_disk(tmp_path / FILE_NAME) as (sink, file):
        for step in range(1, 6):
            sink.train(train_record(step=step))
        file.room = 1 << 20
        lacks = sink.close()
    assert lacks is not None
    assert "lacks 2 line(s) that could not be written (too many" in lacks
    assert [record.step for record in read_metrics(tmp_path).train] == [1, 2, 3]


def test_a_roll_back_on_a_full_disk_is_one_message(tmp_path: Path) -> None:
    with sink_on_full_disk(tmp_path / FILE_NAME) as (sink, _):
        sink.train(train_record(step=1))
        with pytest.raises(UserError, match=r"cannot be rolled back to step 0 \(No space left"):
            sink.roll_back(step=0, tokens=0)


def test_the_log_says_once_that_it_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = LOGGER.handlers, LOGGER.level, LOGGER.propagate
    try:
        configure_logging(0, log_file=tmp_path / "log.txt")
        handler = LOGGER.handlers[1]
        assert isinstance(handler, logging.FileHandler)
        handler.stream = Path("/dev/full").open("a")  # noqa: SIM115 - closed with the handler
        for number in range(3):
            LOGGER.info("line %d", number)
        said = capsys.readouterr().err
        assert [f"line {number}" in said for number in range(3)] == [True] * 3
        assert said.count("log.txt cannot be written") == 1
        assert "Traceback" not in said
    finally:
        LOGGER.handlers, LOGGER.level, LOGGER.propagate = before


if __name__ == "__main__":
    scenario(Path(sys.argv[1]))
