"""Lines of metrics.jsonl that could not be written yet: a disk that is full for a while costs a run nothing."""

import time
from collections import deque
from io import FileIO
from pathlib import Path

from megatron_ext.runtime.log import LOGGER

_MOST_LINES = 100_000
_SAY_AGAIN_SECONDS = 600.0


class WaitingLines:
    """Lines in the order in which they have to be written; the first may be the rest of one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: deque[bytes] = deque()
        self._lost = 0
        self._said = -_SAY_AGAIN_SECONDS

    def add(self, line: bytes, error: OSError) -> None:
        """Keep a line for later; the failure is said where it has not been for a while."""
        if len(self._lines) < _MOST_LINES:
            self._lines.append(line)
        else:
            self._lost += 1
        if time.monotonic() - self._said >= _SAY_AGAIN_SECONDS:
            self._said = time.monotonic()
            LOGGER.warning(
                "%s cannot be written (%s): the run goes on, up to %s lines are kept in memory and written when that "
                "works again; make room",
                self._path,
                error.strerror or error,
                f"{_MOST_LINES:,}",
            )

    def write_to(self, file: FileIO) -> None:
        """Write what waits.

        Raises:
            OSError: that still fails; what is left goes on waiting.
        """
        count = len(self._lines)
        while self._lines:
            written = file.write(self._lines[0])
            if written == len(self._lines[0]):
                self._lines.popleft()
            else:
                self._lines[0] = self._lines[0][written:]
        if count:
            LOGGER.info("%s can be written again: %s lines that had waited are there", self._path, f"{count:,}")

    def missing(self, error: OSError | None) -> str | None:
        """What the file lacks at the end of a run, where ``error`` is why; None where it lacks nothing."""
        count = len(self._lines) + self._lost
        if not count:
            return None
        why = "too many to keep in memory while it could not be written" if error is None else error.strerror or error
        return (
            f"{self._path} lacks {count:,} line(s) that could not be written ({why}); everything else of the run is in "
            "its directory: make room there before the next start"
        )
