"""Some fields of a metrics file as arrays, several times faster than as records.

Lines that this project writes have one form (one object without nested ones, ``kind`` first), and a field can be found
in them by a pattern; parsing the whole line costs many times that. Every other line (a value that is not finite, other
spacing, another kind) is parsed, so what comes out is the same for any file that ``read_metrics`` reads.
"""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import metrics_file, not_a_record
from megatron_ext.metrics.records import EvalRecord, TrainRecord, decode, required_fields

Rows = npt.NDArray[np.float64]
"""[fields, records]"""

_BLOCK = 1 << 17
"""Bytes that are searched together: so few that most blocks hold no line but those of steps."""

_KINDS: Mapping[str, type[TrainRecord] | type[EvalRecord]] = {cls.kind: cls for cls in (TrainRecord, EvalRecord)}
_DETAIL = re.compile(rb', "adam_var": \{"layers": \{[^{}]*\}, "kinds": \{[^{}]*\}\}')
"""The one nested value that many lines may have; no column is taken from it."""

_WORDS = {b"null": b"nan", b"true": b"1", b"false": b"0"}


def read_columns(path: Path, names: Sequence[str], *, kind: str = "train") -> dict[str, npt.NDArray[np.float64]]:
    """Numeric fields ``names`` of all records of a kind ("train" or "eval"), as float64 [records] in the file's order.

    A field that a record does not have, or that is null there, is NaN. Reads files that a run is writing or was killed
    while writing; of lines in this project's own form it looks at no other fields than these.

    Args:
        path: The file, or a run's directory that holds metrics.jsonl.
        names: Fields of the record that hold numbers or truth values (1 and 0).
        kind: Which lines.

    Raises:
        UserError: there is no such file, or a line other than a partial last one is no record (its number is named).
    """
    file = metrics_file(path)
    search = _Search(_KINDS[kind], names)
    rows, first = [np.empty((len(names), 0))], 1
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            block += opened.readline()
            if b'"adam_var": {' in block:
                block = _DETAIL.sub(b"", block)
            lines = block.count(b"\n")
            found = search.found(block, lines) if search.is_plain(block, lines) else None
            rows.append(_mixed(file, first, block, search) if found is None else found)
            first += lines
    return dict(zip(names, np.concatenate(rows, axis=1), strict=True))


class _Search:
    """Finds fields in plain lines: whole ones of the kind that is looked for, nothing nested, no escapes in strings."""

    def __init__(self, kind: type[TrainRecord] | type[EvalRecord], names: Sequence[str]) -> None:
        self.kind = kind
        self.names = names
        self._head = _head(kind)
        self.other_heads = tuple(_head(other) for other in _KINDS.values() if other is not kind)
        # To the end of the line, so that each line has one match at most.
        value = rb'": ?(-?[0-9][^,}\s]*|null|true|false)[^\n]*'
        self._patterns = [re.compile(b'"' + re.escape(name).encode() + value) for name in names]
        self._required = [name in required_fields(kind) for name in names]

    def is_plain(self, text: bytes, lines: int) -> bool:
        """Whether all ``lines`` lines of ``text``, each with its newline, are plain."""
        return (
            text.startswith(self._head)
            and text.count(b"\n" + self._head) == lines - 1
            and text.count(b"{") == text.count(b"}\n") == lines
            and text.endswith(b"\n")
            and b"\\" not in text
        )

    def found(self, text: bytes, lines: int) -> Rows | None:
        """The fields [names, lines] of plain lines; None where one of them must be parsed to say what is wrong."""
        rows = np.full((len(self.names), lines), np.nan)
        for row, pattern, required in zip(rows, self._patterns, self._required, strict=True):
            try:
                if not required:
                    _fill(row, pattern, text)
                    continue
                values = pattern.findall(text)
                if len(values) != lines:
                    return None
                row[:] = _numbers(values)
            except ValueError:
                return None
        return rows


def _head(kind: type[TrainRecord] | type[EvalRecord]) -> bytes:
    return b'{"kind": "%s", ' % kind.kind.encode()


def _fill(row: npt.NDArray[np.float64], pattern: re.Pattern[bytes], text: bytes) -> None:
    """Put the numbers that are found at their lines' places in ``row``, which may be few."""
    matches = list(pattern.finditer(text))
    if not matches:
        return
    numbers = _numbers([match[1] for match in matches])
    if len(matches) == len(row):
        row[:] = numbers
        return
    ends = np.flatnonzero(np.frombuffer(text, dtype=np.uint8) == ord("\n"))
    row[np.searchsorted(ends, [match.start() for match in matches])] = numbers


def _numbers(spelled: list[bytes]) -> npt.NDArray[np.float64]:
    texts = np.array(spelled, dtype=bytes)
    for word, number in _WORDS.items():
        texts[texts == word] = number
    return texts.astype(np.float64)


def _mixed(path: Path, first: int, block: bytes, search: _Search) -> Rows:
    """The fields of a block whose first line has number ``first``; lines that are not plain are parsed."""
    lines = block.splitlines(keepends=True)
    plain = np.array([search.is_plain(_ended(line), 1) for line in lines], dtype=bool)
    found = search.found(b"".join(_ended(line) for line in compress(lines, plain)), int(plain.sum()))
    if found is None:
        plain[:] = False
        found = np.empty((len(search.names), 0))
    parsed: list[list[float]] = []
    of_kind = plain.copy()
    for index in np.flatnonzero(~plain).tolist():
        values = _parsed(lines[index], search, path=path, number=first + index)
        if values is not None:
            of_kind[index] = True
            parsed.append(values)
    result = np.empty((len(search.names), int(of_kind.sum())))
    result[:, plain[of_kind]] = found
    result[:, ~plain[of_kind]] = np.array(parsed, dtype=np.float64).reshape(-1, len(search.names)).T
    return result


def _parsed(line: bytes, search: _Search, *, path: Path, number: int) -> list[float] | None:
    """The values of one line; None where it is another kind of record, or the partial end of the file."""
    if line.startswith(search.other_heads) and line.endswith(b"}\n"):
        # Of another kind, which is seen without parsing: among a million steps the few validations are found so.
        return None
    try:
        value = json.loads(line)
    except ValueError as error:
        if not line.endswith(b"\n"):
            return None
        raise UserError(not_a_record(path, number, str(error))) from None
    if not isinstance(value, dict):
        raise UserError(not_a_record(path, number, f"it is {line[:80]!r}"))
    try:
        record = decode(value)
        return [_number(getattr(record, name, None)) for name in search.names] if type(record) is search.kind else None
    except (TypeError, UserError) as error:
        raise UserError(not_a_record(path, number, str(error))) from None


def _ended(line: bytes) -> bytes:
    """The line with its newline, which the last one of a file may lack."""
    return line if line.endswith(b"\n") else line + b"\n"


def _number(value: object) -> float:
    if value is None:
        return np.nan
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"{value!r} is no number")
