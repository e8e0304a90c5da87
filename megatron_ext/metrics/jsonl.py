"""metrics.jsonl: appended line by line, rewound at resume.

A line is written with one write() to a file opened for appending and not buffered by the process: a process killed
at any moment leaves at most one partial line, at the end. The next writer drops such a line, readers ignore it.
"""

import json
import os
from mmap import ACCESS_READ, mmap
from pathlib import Path

from megatron_ext.metrics.records import (
    EvalRecord,
    Record,
    TrainRecord,
    encode,
)
from megatron_ext.runtime.files import replacing

ROLLED_BACK_NAME = "rolled_back.jsonl"
"""Name of the file beside it that keeps the records of steps over which the run rolled back."""


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
        if not self._path.stat().st_size:
            return
        from megatron_ext.metrics.reading import read_records  # a new run has nothing to read

        if not any(_is_after(record, step) for _, record in read_records(self._path)):
            return
        with replacing(self._path) as out:
            for line, record in read_records(self._path):
                if not _is_after(record, step):
                    out.write(line + b"\n")
        self._file.close()
        self._file = self._path.open("ab", buffering=0)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """As ``rewind``, but what is dropped goes to the end of ``rolled_back.jsonl``: these steps did happen."""
        from megatron_ext.metrics.reading import read_records

        del tokens
        dropped = [line for line, record in read_records(self._path) if _is_after(record, step)]
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
