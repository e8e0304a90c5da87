"""Files and directories that are whole or not there: forced to disk, and renamed into place in one go."""

import errno
import os
import shutil
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


def publish_directory(source: Path, target: Path) -> bool:
    """Give a finished directory its final name, so that ``target`` is seen whole or not at all, also after a crash.

    Returns:
        Whether ``source`` became ``target``; false where there is one already: then ``source`` is removed.

    Raises:
        OSError: it cannot be written there; ``source`` is as it was.
    """
    # Content first, then the names, then the parent's name for it: a rename that survives a crash finds all of it.
    for path in source.rglob("*"):
        sync(path)
    sync(source)
    try:
        source.rename(target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(source)
        return False
    sync(target.parent)
    return True
