"""Reading metrics.jsonl, also one that a run is writing: as records or as columns."""

import json
import math
import sys
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import (
    FILE_NAME,
    EvalRecord,
    EventRecord,
    Record,
    TrainRecord,
    decode,
    required_fields,
)

Column = npt.NDArray[np.float64]
"""[records]"""

_CHUNK = 512
"""Lines parsed together: one call of the parser for many is faster than one for each, while they fit the cache."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """All records of a file, by kind, each in the order written."""

    train: tuple[TrainRecord, ...]
    evaluations: tuple[EvalRecord, ...]
    events: tuple[EventRecord, ...]


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file as records, also one that a run is writing or was killed while writing.

    Args:
        path: the file, or a run's directory that holds metrics.jsonl.

    Raises:
        UserError: there is no such file, or a line other than a partial last one is no record (its number is named).
    """
    records = [record for _, record in read_records(metrics_file(path))]
    return Metrics(
        train=tuple(record for record in records if isinstance(record, TrainRecord)),
        evaluations=tuple(record for record in records if isinstance(record, EvalRecord)),
        events=tuple(record for record in records if isinstance(record, EventRecord)),
    )


def read_events(path: Path) -> list[EventRecord]:
    """The events of a metrics file, without a look into its other lines; errors as of ``read_metrics``."""
    events = (record for _, record in read_records(metrics_file(path), kind=EventRecord.kind))
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
            except (TypeError, OverflowError):
                number, item = next((n, v[name]) for n, v in kept if not _is_number(v.get(name)))
                raise UserError(_not_a_record(file, number, f"{str(item)[:80]!r} is no number")) from None
    return {name: np.frombuffer(column) if column else np.empty(0) for name, column in columns.items()}


def _is_number(item: object) -> bool:
    return item is None or isinstance(item, float) or (isinstance(item, int) and abs(item) <= sys.float_info.max)


def metrics_file(path: Path) -> Path:
    """The metrics file that ``path`` (itself, or a run's directory) names; UserError where there is none."""
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"{path}: no {FILE_NAME} there; name a run's directory (what `train` wrote to) or the file itself"
        )
    return file


def read_records(path: Path, *, kind: str | None = None) -> Iterator[tuple[bytes, Record | None]]:
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
        except (ValueError, RecursionError) as error:
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
