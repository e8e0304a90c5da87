"""metrics.jsonl: appended line by line, rewound at resume, read back as records or as columns.

A line is written with one write() to a file opened for appending and not buffered by the process: a process killed
at any moment leaves at most one partial line, at the end. The next writer drops such a line, readers ignore it.
"""

import json
import math
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import (
    EvalRecord,
    EventRecord,
    Record,
    TrainRecord,
    decode,
    encode,
    required_fields,
)
from megatron_ext.runtime.files import replacing

Column = npt.NDArray[np.float64]
"""[records]"""

FILE_NAME = "metrics.jsonl"
"""Name of the file in a run's directory."""

ROLLED_BACK_NAME = "rolled_back.jsonl"
"""Name of the file beside it that keeps the records of steps over which the run rolled back."""

_CHUNK = 512
"""Lines parsed together: one call of the parser for many is faster than one for each, while they fit the cache."""


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
        if not any(_is_after(record, step) for _, record in _records(self._path)):
            return
        with replacing(self._path) as out:
            for line, record in _records(self._path):
                if not _is_after(record, step):
                    out.write(line + b"\n")
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """As ``rewind``, but what is dropped goes to the end of ``rolled_back.jsonl``: these steps did happen."""
        del tokens
        dropped = [line for line, record in _records(self._path) if _is_after(record, step)]
        with self._path.with_name(ROLLED_BACK_NAME).open("ab") as out:
            out.writelines(line + b"\n" for line in dropped)
            out.flush()
            os.fsync(out.fileno())
        self.rewind(step)

    def _append(self, record: Record) -> None:
        """Write a line."""
        data = (encode(record) + "\n").encode()
        written = self._file.write(data)
        # A raw write may be short (a full disk, a network file system): the rest follows, or raises the reason.
        while written < len(data):
            data = data[written:]
            written = self._file.write(data)

    train = evaluation = event = _append

    def close(self) -> None:
        """Close the file, its content on disk."""
        if self._file.closed:
            return
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file as records, also one that a run is writing or was killed while writing.

    Args:
        path: the file, or a run's directory that holds metrics.jsonl.

    Raises:
        UserError: there is no such file, or a line other than a partial last one is no record (its number is named).
    """
    records = [record for _, record in _records(metrics_file(path))]
    return Metrics(
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvalRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
    )


def read_events(path: Path) -> list[EventRecord]:
    """The events of a metrics file, without a look into its other lines; errors as of ``read_metrics``."""
    events = (record for _, record in _records(metrics_file(path), kind=EventRecord.kind))
    return [event for event in events if isinstance(event, EventRecord)]


def read_columns(path: Path, names: Sequence[str], *, kind: str = "train") -> dict[str, Column]:
    """Numeric fields ``names`` of all records of a kind ("train" or "eval"), as float64 [records] in the file's order.

    A field that a record does not have, or that is null there, is NaN. Several times faster than ``read_metrics``, and
    reads the same files.

    Args:
        path: The file, or a run's directory that holds metrics.jsonl.
        names: Fields of the record that hold numbers or truth values (1 and 0).
        kind: Which lines.

    Raises:
        UserError: there is no such file, or a line other than a partial last one is no record (its number is named).
    """
    file = metrics_file(path)
    required = {"kind", *names} & {"kind", *required_fields(kind)}
    columns = {name: array("d") for name in names}
    for lines in _chunks(file, kind=kind):
        kept: list[tuple[int, Mapping[str, object]]] = []
        for number, line, value in lines:
            # Our own lines hold their fields as they are; others go the long way, to the same values or an error.
            if (
                isinstance(value, dict)
                and "non_finite" not in value
                and required <= value.keys()
                and value["kind"] == kind
            ):
                kept.append((number, value))
            elif (record := _decoded(file, number, line=line, value=value)) is not None and record.kind == kind:
                kept.append((number, {name: getattr(record, name, None) for name in names}))
        for name, column in columns.items():
            try:
                column.extend([math.nan if (item := value.get(name)) is None else item for _, value in kept])  # type: ignore[misc]
            except TypeError:
                number, item = next((n, v[name]) for n, v in kept if not isinstance(v.get(name), int | float | None))
                raise UserError(_not_a_record(file, number, f"{item!r} is no number")) from None
    return {name: np.frombuffer(column) if column else np.empty(0) for name, column in columns.items()}


def metrics_file(path: Path) -> Path:
    """The metrics file that ``path`` (itself, or a run's directory) names; UserError where there is none."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no {FILE_NAME} there; name a run's directory (what `train` wrote to) or the file itself"
        )
    return file


def _records(path: Path, *, kind: str | None = None) -> Iterator[tuple[bytes, Record | None]]:
    """Each line without its newline, with its record (None: a kind of a later version); ``kind`` as of ``_chunks``."""
    for lines in _chunks(path, kind=kind):
        for number, line, value in lines:
            yield line.rstrip(b"\n"), _decoded(path, number, line=line, value=value)


def _chunks(path: Path, *, kind: str | None = None) -> Iterator[list[tuple[int, bytes, object]]]:
    """Number, text and value of each line, some lines at a time.

    With a ``kind``, lines that begin as those of another kind are left out without parsing them.
    """
    others = {cls.kind for cls in (TrainRecord, EvalRecord)} - {kind} if kind else ()
    heads = tuple(f'{{"kind": "{other}", '.encode() for other in others)
    first = 1
    with path.open("rb") as file:
        while lines := list(islice(file, _CHUNK)):
            kept = [
                (number, line)
                for number, line in enumerate(lines, first)
                if not (line.startswith(heads) and line.endswith(b"}\n"))
            ]
            yield [(number, line, value) for (number, line), value in zip(kept, _parse(path, kept), strict=False)]
            first += len(lines)


def _parse(path: Path, lines: Sequence[tuple[int, bytes]]) -> list[object]:
    """The values of the lines; one fewer where the last line is partial."""
    try:
        values: list[object] = orjson.loads(b"[" + b",".join(line for _, line in lines) + b"]")
    except ValueError:
        values = []
    if len(values) == len(lines):
        return values
    # Line by line, to name the one that is wrong; and foreign lines may hold what Python reads beyond JSON, like NaN.
    values = []
    for number, line in lines:
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if not line.endswith(b"\n"):
                break
            raise UserError(_not_a_record(path, number, str(error))) from None
    return values


def _decoded(path: Path, number: int, *, line: bytes, value: object) -> Record | None:
    """The record of a line's value; None for a kind of a later version."""
    if not isinstance(value, dict):
        raise UserError(_not_a_record(path, number, f"it is {line[:80]!r}"))
    try:
        return decode(value)
    except UserError as error:
        raise UserError(_not_a_record(path, number, str(error))) from None


def _not_a_record(path: Path, number: int, reason: str) -> str:
    return f"{path}, line {number}: not a metrics record ({reason}); correct or remove the line"


def _is_after(record: Record | None, step: int) -> bool:
    return isinstance(record, TrainRecord | EvalRecord) and record.step > step


def _repair_end(path: Path) -> None:
    """End the file with a whole line: a partial last line is cut off, a whole one without its newline gets it."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open("rb+") as file:
        with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
            start = content.rfind(b"\n") + 1
            line = content[start:]
        try:
            json.loads(line)
        except ValueError:
            # An empty line too: then nothing is cut off.
            file.truncate(start)
        else:
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
