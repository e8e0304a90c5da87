"""Files and directories that are whole or not there: forced to disk, and given their names in one go."""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

_EXISTS = frozenset({errno.EEXIST, errno.ENOTEMPTY})


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
    except OSError as error:
        error.filename = error.filename or str(path)  # a write that fails does not say of which file
        raise
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


def publish_directory(source: Path, target: Path, *, keep: Callable[[Path], bool] = lambda _there: True) -> bool:
    """Give a finished directory its name, forced to disk: whoever sees ``target`` sees all of it, also after a crash.

    Args:
        source: Beside ``target``, on the same file system; what was written there is done.
        target: Its name from now on.
        keep: Called with a directory that has the name already: whether it stays. If not, as where it is damaged, it
            is moved away and replaced.

    Returns:
        Whether ``source`` is ``target`` now; False where another process was first, and then ``source`` is removed.

    Raises:
        OSError: it cannot be read or renamed.
    """
    for path in (*source.rglob("*"), source):
        sync(path)
    while True:
        try:
            source.rename(target)
        except OSError as error:
            if error.errno not in _EXISTS:
                raise
        else:
            sync(target.parent)
            return True
        if keep(target):
            shutil.rmtree(source)
            return False
        # Moved before it is deleted: a deletion takes time and may be cut short.
        aside = source.with_name(f"{source.name}.old")
        with suppress(FileNotFoundError):
            target.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
