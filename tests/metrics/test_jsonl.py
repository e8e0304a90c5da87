"""metrics.jsonl: appending, rewinding, and reading what a killed run left, as records and as columns."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.reading import Metrics, read_columns, read_events, read_metrics
from megatron_ext.metrics.records import FILE_NAME, EvalRecord, EventRecord, encode
from tests.metrics.test_records import train_record, train_records


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


def test_appending_goes_on_and_lines_are_on_file_before_close(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path)
    sink = JsonlSink(path)
    sink.train(train_record(step=5))
    assert steps_of(path) == [1, 2, 3, 4, 5]
    sink.close()
    sink.close()


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


NAMES = ("step", "tokens", "loss", "loss_ratio", "skipped", "mfu", "prefix_loss", "adam_var_l1", "grad_norm")
numbers = st.floats(allow_nan=True, allow_infinity=True)
records = st.one_of(
    train_records,
    st.builds(EvalRecord.from_loss, step=st.just(1), tokens=st.just(8), loss=numbers),
    st.builds(EventRecord, st.just("odd"), st.dictionaries(st.sampled_from(["loss", "path"]), st.text(max_size=3))),
)
spacings = st.sampled_from([None, (",", ":"), (" , ", " : ")])


@settings(max_examples=60, deadline=None)
@given(lines=st.lists(st.tuples(records, spacings), max_size=12), cut=st.integers(0, 60), chunk=st.sampled_from([1, 5]))
def test_columns_and_events_are_those_of_the_records(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[Any, Any]], cut: int, chunk: int
) -> None:
    path = tmp_path_factory.mktemp("columns") / FILE_NAME
    texts = [json.dumps(json.loads(encode(record)), separators=spacing) for record, spacing in lines]
    content = "".join(text + "\n" for text in texts).encode()
    path.write_bytes(content[: max(0, len(content) - cut)])
    metrics = read_metrics(path)
    assert tuple(read_events(path)) == metrics.events
    found: Any
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ext.metrics.reading._CHUNK", chunk)
        for kind, found in (("train", metrics.train), ("eval", metrics.evaluations)):
            columns = read_columns(path.parent, NAMES, kind=kind)
            assert list(columns) == list(NAMES)
            for name in NAMES:
                values = [getattr(record, name, None) for record in found]
                np.testing.assert_array_equal(columns[name], [math.nan if v is None else float(v) for v in values])


@pytest.mark.parametrize(
    ("line", "records_too"),
    [
        ("{broken", True),
        ("3", True),
        ("", True),
        ('{"kind": "eval"}', True),
        ('{"kind": "train"},{"kind": "train"}', True),
        ('{"kind": "train", "step": 1}', True),
        (encode(train_record()).replace('"loss": 5.5, ', ""), True),
        (encode(train_record()).replace('"loss": 5.5', '"loss": "5.5"'), False),
        (encode(train_record()).replace('"loss": 5.5', '"loss": 5.5.5'), True),
        (encode(train_record()).replace('"loss": 5.5', '"loss": +5.5'), True),
        (encode(train_record()).replace('"loss": 5.5', '"loss": '), True),
        (encode(train_record(loss=math.nan)).replace('"nan"', '"many"'), True),
        (encode(train_record())[:-1], True),
    ],
)
@pytest.mark.parametrize("number", [1, 3, 1501])
def test_a_broken_line_is_named(tmp_path: Path, line: str, records_too: bool, number: int) -> None:
    lines = [encode(train_record(step=step)) for step in range(1, number + 3)]
    lines.insert(number - 1, line)
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    message = f"line {number}: not a metrics record"
    with pytest.raises(UserError, match=message):
        read_columns(tmp_path, ("step", "loss"))
    if records_too:
        with pytest.raises(UserError, match=message):
            read_metrics(tmp_path)


@pytest.mark.parametrize("value", ["1" * 400, "-" + "9" * 400, "[" * 100_000 + "]" * 100_000, "[" * 100_000])
def test_numbers_and_depths_that_no_record_has_are_one_message(tmp_path: Path, value: str) -> None:
    line = encode(train_record())
    (tmp_path / FILE_NAME).write_text(f"{line}\n{line.replace('5.5', value)}\n")
    with pytest.raises(UserError, match="line 2: not a metrics record") as caught:
        read_columns(tmp_path, ("step", "loss"))
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_depth_beside_a_spelled_number_is_one_message(tmp_path: Path) -> None:
    deep = '{"kind": "event", "name": "x", "y": ' + "[" * 990 + "]" * 990 + ', "non_finite": {"y[0]": "nan"}}'
    (tmp_path / FILE_NAME).write_text(deep + "\n")
    with pytest.raises(UserError, match="line 1: not a metrics record"):
        read_events(tmp_path)


def test_a_directory_in_the_place_of_the_file_is_named(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    for path in (tmp_path, tmp_path / FILE_NAME):
        with pytest.raises(UserError, match=r"no metrics\.jsonl there"):
            read_metrics(path)


@pytest.mark.parametrize(
    "spelled", ["5.500000000000000000000000000000000001", "true", " 5.5", "null", "-0", "1e-320", "1e400", "NaN"]
)
def test_every_spelling_of_a_number_is_read_as_json_reads_it(tmp_path: Path, spelled: str) -> None:
    lines = [encode(train_record(step=step, prefix_loss=5.5)) for step in (1, 2, 3)]
    lines[1] = lines[1].replace('"prefix_loss": 5.5', f'"prefix_loss": {spelled}')
    (tmp_path / FILE_NAME).write_text("\n".join(lines) + "\n")
    value = json.loads(spelled)
    expected = [5.5, math.nan if value is None else float(value), 5.5]
    np.testing.assert_array_equal(read_columns(tmp_path, ("prefix_loss",))["prefix_loss"], expected)


@pytest.mark.parametrize("read", [read_metrics, read_events, lambda path: read_columns(path, ("step",))])
def test_a_missing_file_is_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl there"):
        read(tmp_path)


def test_an_empty_file_has_no_records(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).touch()
    assert read_metrics(tmp_path) == Metrics((), (), ())
    assert [column.shape for column in read_columns(tmp_path, ("step", "loss")).values()] == [(0,), (0,)]


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
    deadline = time.monotonic() + 120
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
