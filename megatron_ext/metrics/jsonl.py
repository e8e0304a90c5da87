"""metrics.jsonl: appended line by line, rewound at resume.

A line is written with one write() to a file opened for appending and not buffered by the process: a process killed
at any moment leaves at most one partial line, at the end. The next writer drops such a line, readers ignore it. What
cannot be written waits in memory (``metrics/waiting.py``).
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import Record, encode

if TYPE_CHECKING:
    from megatron_ext.metrics.waiting import WaitingLines

ROLLED_BACK_NAME = "rolled_back.jsonl"
"""Name of the file beside it that keeps the records of steps over which the run rolled back."""


class JsonlSink:
    """Appends records to a metrics file (created with its folder where missing).

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._waiting: WaitingLines | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            from megatron_ext.metrics.rewinding import repair_end  # a new run has nothing to repair

            repair_end(path)
        self._file = path.open("ab", buffering=0)

    def rewind(self, step: int) -> None:
        """Drop the train and eval records after `step` finished steps: the run goes on from there.

        Events stay, they did happen.

        Raises:
            UserError: a line of the file is no record.
            OSError: the file cannot be replaced.
        """
        if not self._path.stat().st_size:
            return
        from megatron_ext.metrics.rewinding import drop_after

        if drop_after(self._path, step):
            self._file.close()
            self._file = self._path.open("ab", buffering=0)

    def roll_back(self, *, step: int, tokens: int) -> None:
        """As ``rewind``, but what is dropped goes to the end of ``rolled_back.jsonl``: these steps did happen.

        Raises:
            UserError: a line of the file is no record, or the files cannot be written.
        """
        del tokens
        from megatron_ext.metrics.rewinding import copy_after

        try:
            if self._waiting is not None:
                self._waiting.write_to(self._file)
            copy_after(self._path, step, to=self._path.with_name(ROLLED_BACK_NAME))
            self.rewind(step)
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be rolled back to step {step} ({error.strerror or error}); make room and start "
                "again: the run goes on from there"
            ) from error

    def _append(self, record: Record) -> None:
        """Write a line, after those that wait; keep it where that fails."""
        rest = (encode(record) + "\n").encode()
        try:
            if self._waiting is not None:
                self._waiting.write_to(self._file)
            # A raw write may be short (a full disk, a network file system): the rest follows, or raises the reason.
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            if self._waiting is None:
                from megatron_ext.metrics.waiting import WaitingLines

                self._waiting = WaitingLines(self._path)
            self._waiting.add(rest, error)

    train = evaluation = event = _append

    def close(self) -> str | None:
        """Close the file, its content on disk; what it lacks, in words, or None."""
        if self._file.closed:
            return None
        try:
            if self._waiting is not None:
                self._waiting.write_to(self._file)
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            lacks = None if self._waiting is None else self._waiting.missing(error)
            return (
                lacks or f"{self._path} could not be forced to disk ({error.strerror or error}): lines may be missing"
            )
        return None if self._waiting is None else self._waiting.missing(None)
