"""metrics.jsonl: appending, rewinding, and reading what a killed run left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import JsonlSink, read_metrics
from megatron_ext.metrics.records import EvalRecord, EventRecord, encode
from tests.metrics.test_records import train_record


def write_run(path: Path, steps: int = 4) -> None:
    sink = JsonlSink(path)
    sink.event(EventRecord("start", {}))
    for step in range(1, steps + 1):
        sink.train(train_record(step=step))
        if step % 2 == 0:
            sink.evaluation(EvalRecord.from_loss(step=step, tokens=step * 8, loss=2.0))
            sink.event(EventRecord("checkpoint", {"step": step}))
    sink.close()


def steps_of(path: Path) -> list[int]:
    return [record.step for record in read_metrics(path).train]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write_run(tmp_path / "run" / "metrics.jsonl")
    metrics = read_metrics(tmp_path / "run")
    assert metrics.train == tuple(train_record(step=step) for step in (1, 2, 3, 4))
    assert [record.step for record in metrics.evaluations] == [2, 4]
    assert [record.name for record in metrics.events] == ["start", "checkpoint", "checkpoint"]


def test_lines_are_on_file_before_close(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.train(train_record(step=1))
    assert steps_of(tmp_path) == [1]
    sink.close()
    sink.close()


def test_appending_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    sink = JsonlSink(path)
    sink.train(train_record(step=5))
    sink.close()
    assert steps_of(path) == [1, 2, 3, 4, 5]


@given(keep=st.integers(0, 6), cut=st.integers(0, 60))
def test_rewind_drops_later_steps_and_keeps_events(
    tmp_path_factory: pytest.TempPathFactory, keep: int, cut: int
) -> None:
    path = tmp_path_factory.mktemp("rewind") / "metrics.jsonl"
    write_run(path)
    whole = encode(train_record(step=5))
    with path.open("a") as file:
        file.write(whole[: min(cut, len(whole) - 1)])
    sink = JsonlSink(path)
    sink.rewind(keep)
    sink.event(EventRecord("resume", {"step": keep}))
    sink.train(train_record(step=keep + 1))
    sink.close()
    metrics = read_metrics(path)
    assert [record.step for record in metrics.train] == [*range(1, min(keep, 4) + 1), keep + 1]
    assert [record.step for record in metrics.evaluations] == [step for step in (2, 4) if step <= keep]
    assert [record.name for record in metrics.events] == ["start", "checkpoint", "checkpoint", "resume"]
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@given(cut=st.integers(1, 400))
def test_a_cut_file_gives_its_whole_lines(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    write_run(path)
    content = path.read_bytes()[:-cut]
    path.write_bytes(content)
    expected = [json.loads(line) for line in content.split(b"\n")[:-1]]
    tail = content.split(b"\n")[-1]
    # A tail that is a whole object only lacks its newline.
    expected += [json.loads(tail)] if tail.endswith(b"}") else []
    metrics = read_metrics(path)
    assert len(metrics.train) + len(metrics.evaluations) + len(metrics.events) == len(expected)
    JsonlSink(path).close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == expected


def test_a_last_line_longer_than_a_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    before = path.read_bytes()
    path.write_bytes(before + b'{"sample_ids": [' + b"123456, " * 30_000)
    JsonlSink(path).close()
    assert path.read_bytes() == before


def test_kinds_of_a_later_version_survive_a_rewind(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    with path.open("a") as file:
        file.write('{"kind": "profile", "step": 9}\n')
    sink = JsonlSink(path)
    sink.rewind(1)
    sink.close()
    assert json.loads(path.read_text().splitlines()[-1]) == {"kind": "profile", "step": 9}
    assert steps_of(path) == [1]


@pytest.mark.parametrize("line", ["{broken", "3", '{"kind": "eval"}', '{"kind": "train"},{"kind": "train"}', ""])
def test_a_broken_line_in_the_middle_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], line, *lines[2:]]) + "\n")
    with pytest.raises(UserError, match="line 3: not a metrics record"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl there"):
        read_metrics(tmp_path)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path).train == ()


WRITER = """
import sys
from pathlib import Path
from megatron_ext.metrics.jsonl import JsonlSink
from tests.metrics.test_records import train_record
sink = JsonlSink(Path(sys.argv[1]))
step = 0
while True:
    step += 1
    sink.train(train_record(step=step, sample_ids=tuple(range(2000))))
"""


def test_sigkill_loses_at_most_a_partial_last_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 30
    while (not path.exists() or path.stat().st_size < 200_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    steps = steps_of(path)
    assert len(steps) > 5
    assert steps == list(range(1, len(steps) + 1))


def test_a_long_file_is_read_fast(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    line = encode(train_record())
    path.write_text((line + "\n") * 100_000)
    start = time.perf_counter()
    assert len(read_metrics(path).train) == 100_000
    # It takes one to two seconds; the bound only catches something quadratic.
    assert time.perf_counter() - start < 20
