"""Some fields of a metrics file as arrays, many times faster than as records.

Lines that this project writes have one form (one object without nested ones, ``kind`` first, a space after each comma
and colon), so a field is where its name follows a comma, and numpy finds those places for many lines at once. Parsing
costs many times that. Every other line (a value that is not finite, other spacing, another kind) is parsed, so what
comes out is the same for any file that ``read_metrics`` reads.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import metrics_file, not_a_record
from megatron_ext.metrics.records import EvalRecord, TrainRecord, decode, required_fields

Rows = npt.NDArray[np.float64]
"""[fields, records]"""
Indices = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]

_BLOCK = 1 << 20
"""Bytes that are searched together: so few that what numpy makes of them stays in the processor's cache."""

_KINDS: Mapping[str, type[TrainRecord] | type[EvalRecord]] = {cls.kind: cls for cls in (TrainRecord, EvalRecord)}
_DETAIL = re.compile(rb', "adam_var": \{"layers": \{[^{}]*\}, "kinds": \{[^{}]*\}\}')
"""The one nested value that many lines may have; no column is taken from it."""

_WORDS = {b"null": np.nan, b"true": 1.0, b"false": 0.0}
_WORD = 8
"""Bytes that are compared at once."""
_LONGEST = 32
"""Bytes of a number; Python spells no float with more than 24."""
_PADDING = bytes(64)
"""After a block, so that what is read from a place near its end is there."""
_BEGIN_NUMBERS = np.isin(np.arange(256), np.frombuffer(b"-0123456789", dtype=np.uint8))
_IN_NUMBERS = np.isin(np.arange(256), np.frombuffer(b"+-.0123456789Ee\0", dtype=np.uint8))


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
    wanted = _Wanted(_KINDS[kind], tuple(names))
    rows, first = [np.empty((len(names), 0))], 1
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK):
            block += opened.readline()
            if b'"adam_var": {' in block:
                block = _DETAIL.sub(b"", block)
            rows.append(_rows(file, first, block, wanted))
            first += block.count(b"\n")
    return dict(zip(names, np.concatenate(rows, axis=1), strict=True))


@dataclass(frozen=True)
class _Wanted:
    """What is looked for."""

    kind: type[TrainRecord] | type[EvalRecord]
    names: tuple[str, ...]

    @property
    def head(self) -> bytes:
        """How a line of the kind begins."""
        return _head(self.kind)

    @property
    def other_heads(self) -> tuple[bytes, ...]:
        """How lines of other kinds begin in which no field is looked for."""
        return tuple(_head(other) for other in _KINDS.values() if other is not self.kind)


def _head(kind: type[TrainRecord] | type[EvalRecord]) -> bytes:
    return b'{"kind": "%s", ' % kind.kind.encode()


def _rows(path: Path, first: int, block: bytes, wanted: _Wanted) -> Rows:
    """The fields of a block whose first line has number ``first``; lines that are not plain are parsed."""
    search = _Search(block if block.endswith(b"\n") else block + b"\n")
    rows, plain = np.full((len(wanted.names), len(search.ends)), np.nan), search.plain(wanted.head)
    for row, name in zip(rows, wanted.names, strict=True):
        there = search.fill(row, name.encode())
        plain &= there if name in required_fields(wanted.kind) else there | search.lacks(name.encode())
    of_kind = plain.copy()
    for index in np.flatnonzero(~plain).tolist():
        line = block[search.starts[index] : search.ends[index] + 1]
        values = _parsed(line, wanted, path=path, number=first + index)
        if values is not None:
            of_kind[index] = True
            rows[:, index] = values
    return rows[:, of_kind]


class _Search:
    """Finds fields in lines of text, each with its newline. What it finds holds for plain lines."""

    def __init__(self, text: bytes) -> None:
        self._text = text
        self._padded = text + _PADDING
        self._bytes = np.frombuffer(self._padded, dtype=np.uint8)
        # Overlapping: entry i holds the bytes from i on.
        self._words = np.ndarray(len(text), np.uint64, buffer=self._padded, strides=(1,))
        self._places: dict[bytes, Indices] = {}
        self.ends = self._all(b"\n")
        """Place of each line's newline."""
        self.starts = np.concatenate((np.zeros(1, np.intp), self.ends[:-1] + 1))
        """Place of each line's first byte."""
        self._commas = np.append(self._all(b","), len(text))
        self._after_commas = self._words[self._commas[:-1]]

    def plain(self, head: bytes) -> Mask:
        """Which lines begin with ``head`` and hold one object, nothing nested and no escapes in strings."""
        found = self._is_at(self.starts, head)
        found &= self._bytes[self.ends - 1] == ord("}")
        for letter, times in ((b"{", 1), (b"}", 1), (b"\\", 0)):
            found &= self._count(letter) == times
        return found

    def lacks(self, name: bytes) -> Mask:
        """Which lines do not hold ``"name"`` in any form."""
        keys = self._keys(name)
        if self._text.count(b'"%s"' % name) > len(keys):
            # Rare (another spacing, a string that equals the name), so not worth telling which lines these are.
            return np.zeros(len(self.ends), dtype=bool)
        lacking = np.ones(len(self.ends), dtype=bool)
        lacking[np.searchsorted(self.ends, self._commas[keys])] = False
        return lacking

    def fill(self, row: npt.NDArray[np.float64], name: bytes) -> Mask:
        """Put the field's numbers at their lines' places in ``row``; says on which lines it did so.

        On a line that holds something else than a number or one of JSON's words it does not.
        """
        keys = self._keys(name)
        begins = self._commas[keys] + len(_key(name))
        lines = np.searchsorted(self.ends, begins)
        lengths = np.minimum(self._commas[keys + 1], self.ends[lines] - 1) - begins
        there = np.zeros(len(row), dtype=bool)
        if not len(keys):
            return there
        width = max(1, min(int(lengths.max()), _LONGEST))
        spelled = np.ndarray(len(self._text), f"S{width}", buffer=self._padded, strides=(1,))[begins]
        letters = spelled.view(np.uint8).reshape(len(keys), -1)
        letters *= np.arange(letters.shape[1]) < lengths[:, None]
        numeric = (lengths > 0) & (lengths <= _LONGEST) & _BEGIN_NUMBERS[letters[:, 0]]
        known = _IN_NUMBERS[letters]
        if not known.all():
            numeric &= known.all(axis=1)
        try:
            row[lines[numeric]] = spelled[numeric].astype(np.float64)
        except ValueError:
            return there
        there[lines[numeric]] = True
        for word, number in _WORDS.items():
            found = lines[~numeric][spelled[~numeric] == word]
            row[found], there[found] = number, True
        return there

    def _all(self, letter: bytes) -> Indices:
        return np.flatnonzero(self._bytes[: len(self._text)] == ord(letter))

    def _count(self, letter: bytes) -> Indices:
        """How often each line holds a letter."""
        if letter not in self._text:
            return np.zeros(len(self.ends), np.intp)
        return np.diff(np.searchsorted(self._all(letter), self.ends), prepend=0)

    def _keys(self, name: bytes) -> Indices:
        """Which commas the field's name follows."""
        if name not in self._places:
            key = _key(name)
            found = np.flatnonzero(self._after_commas == np.frombuffer(key[:_WORD], np.uint64)[0])
            self._places[name] = found[self._is_at(self._commas[found], key)]
        return self._places[name]

    def _is_at(self, places: Indices, expected: bytes) -> Mask:
        """Whether ``expected``, of a word or more, is at each place."""
        found = np.ones(len(places), dtype=bool)
        for offset in {*range(0, len(expected) - _WORD, _WORD), len(expected) - _WORD}:
            # A place near the end may lie so that the word would begin in the padding; it then lies past the text.
            inside = np.minimum(places + offset, len(self._text) - 1)
            found &= self._words[inside] == np.frombuffer(expected[offset : offset + _WORD], np.uint64)[0]
        return found


def _key(name: bytes) -> bytes:
    return b', "%s": ' % name


def _parsed(line: bytes, wanted: _Wanted, *, path: Path, number: int) -> list[float] | None:
    """The values of one line; None where it is another kind of record, or the partial end of the file."""
    if line.startswith(wanted.other_heads) and line.endswith(b"}\n"):
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
        return [_number(getattr(record, name, None)) for name in wanted.names] if type(record) is wanted.kind else None
    except (TypeError, UserError) as error:
        raise UserError(not_a_record(path, number, str(error))) from None


def _number(value: object) -> float:
    if value is None:
        return np.nan
    if isinstance(value, int | float):
        return float(value)
    raise TypeError(f"{value!r} is no number")
