"""Files that are whole or not there: forced to disk, and replaced in one go."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def sync(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that takes the place of ``path`` when the block ends; a block that raises changes nothing.

    Whoever reads ``path`` sees the old content or the new one, also after a crash of the machine. What is written lies
    beside it as ``.NAME.partial-PID`` meanwhile.

    Raises:
        OSError: it cannot be written there.
    """
    aside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with aside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    """Make ``text`` (UTF-8) the content of ``path``, as ``replacing`` does.

    Raises:
        OSError: it cannot be written there.
    """
    with replacing(path) as file:
        file.write(text.encode())
