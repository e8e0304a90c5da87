"""metrics.jsonl: appended line by line, rewound at resume, read back.

A line is written with one write() to a file opened for appending and not buffered by the process: a process killed
at any moment leaves at most one partial line, at the end. The next writer drops such a line, readers ignore it.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import EvalRecord, EventRecord, Record, TrainRecord, decode, encode
from megatron_ext.runtime.files import replacing

FILE_NAME = "metrics.jsonl"
"""Name of the file in a run's directory."""

ROLLED_BACK_NAME = "rolled_back.jsonl"
"""Name of the file beside it that keeps the records of steps over which the run rolled back."""

_CHUNK = 4096
"""Lines parsed together, because one call of the parser for many is faster than one for each."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """All records of a file, by kind, each in the order written."""

    train: tuple[TrainRecord, ...]
    evaluations: tuple[EvalRecord, ...]
    events: tuple[EventRecord, ...]


class JsonlSink:
    """Appends records to a metrics file (created with its folder where missing)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        _repair_end(path)
        self._file = path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drop the train and eval records after `step` finished steps: the run goes on from there.

        Events stay, they did happen. The file is replaced in one go: whoever reads it sees the old or the new one.

        Raises:
            UserError: a line of the file is no record.
        """
        if not any(_is_after(record, step) for _, record in _numbered_records(self._path)):
            return
        with replacing(self._path) as out:
            for line, record in _numbered_records(self._path):
                if not _is_after(record, step):
                    out.write(line + b"\n")
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """As ``rewind``, but what is dropped goes to the end of ``rolled_back.jsonl``: these steps did happen."""
        del tokens
        dropped = [line for line, record in _numbered_records(self._path) if _is_after(record, step)]
        with self._path.with_name(ROLLED_BACK_NAME).open("ab") as out:
            out.writelines(line + b"\n" for line in dropped)
            out.flush()
            os.fsync(out.fileno())
        self.rewind(step)

    def train(self, record: TrainRecord) -> None:
        """Append a step."""
        self._append(record)

    def evaluation(self, record: EvalRecord) -> None:
        """Append a validation."""
        self._append(record)

    def event(self, record: EventRecord) -> None:
        """Append an event."""
        self._append(record)

    def close(self) -> None:
        """Close the file, its content on disk."""
        if self._file.closed:
            return
        os.fsync(self._file.fileno())
        self._file.close()

    def _append(self, record: Record) -> None:
        data = (encode(record) + "\n").encode()
        written = self._file.write(data)
        # A raw write may be short (a full disk, a network file system): the rest follows, or raises the reason.
        while written < len(data):
            data = data[written:]
            written = self._file.write(data)


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file, also one that a run is writing or was killed while writing.

    Args:
        path: the file, or a run's directory that holds metrics.jsonl.

    Raises:
        UserError: there is no such file, or a line other than a partial last one is no record (its number is named).
    """
    records = [record for _, record in _numbered_records(metrics_file(path))]
    return Metrics(
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvalRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
    )


def metrics_file(path: Path) -> Path:
    """The metrics file that ``path`` (itself, or a run's directory) names; UserError where there is none."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no {FILE_NAME} there; name a run's directory (what `train` wrote to) or the file itself"
        )
    return file


def not_a_record(path: Path, number: int, reason: str) -> str:
    """What is said about line ``number`` of a metrics file that holds no record."""
    return f"{path}, line {number}: not a metrics record ({reason}); correct or remove the line"


def _numbered_records(path: Path) -> Iterator[tuple[bytes, Record | None]]:
    """Each line without its newline, with its record (None: a kind of a later version)."""
    first = 1
    with path.open("rb") as file:
        while lines := list(islice(file, _CHUNK)):
            values = _parse(lines, path=path, first=first)
            for number, (line, value) in enumerate(zip(lines, values, strict=False), start=first):
                if not isinstance(value, dict):
                    raise UserError(not_a_record(path, number, f"it is {line[:80]!r}"))
                try:
                    record = decode(value)
                except UserError as error:
                    raise UserError(not_a_record(path, number, str(error))) from None
                yield line.rstrip(b"\n"), record
            first += len(lines)


def _parse(lines: list[bytes], *, path: Path, first: int) -> list[object]:
    """The values of the lines; one fewer where the last line is partial."""
    try:
        values = json.loads(b"[" + b",".join(lines) + b"]")
    except ValueError:
        values = []
    if len(values) == len(lines):
        return list(values)
    values = []
    for number, line in enumerate(lines, start=first):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if not line.endswith(b"\n"):
                break
            raise UserError(not_a_record(path, number, str(error))) from None
    return values


def _is_after(record: Record | None, step: int) -> bool:
    return isinstance(record, TrainRecord | EvalRecord) and record.step > step


def _repair_end(path: Path) -> None:
    """End the file with a whole line: a partial last line is cut off, a whole one without its newline gets it."""
    if not path.exists():
        return
    with path.open("rb+") as file:
        content_end = file.seek(0, os.SEEK_END)
        start = _last_line_start(file, content_end)
        file.seek(start)
        line = file.read()
        if not line:
            return
        try:
            json.loads(line)
        except ValueError:
            file.truncate(start)
        else:
            file.write(b"\n")


def _last_line_start(file: BinaryIO, end: int) -> int:
    """Position behind the last newline before `end`."""
    block = 65536
    while end > 0:
        begin = max(0, end - block)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0
