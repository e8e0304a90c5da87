"""What DeepSpeed compiles at first use (Adam on the CPU, fused Adam), behind a lock that ends with its holder.

torch marks such a build with a file ``lock`` in its folder, which a killed process leaves and for which every later one
waits for ever, without a word. Here the builders of a folder take turns by the kernel's lock on a file of ours, so that
whoever holds that one knows what torch's file means: nothing, or another program.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from megatron_ext.errors import UserError
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.run_lock import advisory_lock, is_held

_LOCK = ".megatron_ext.lock"
_PATIENCE_SECONDS = 1800.0
_SAY_AFTER_SECONDS = 1.0
_STRANGERS_SECONDS = 120.0
"""Without a change in the folder, after which a build by another program, perhaps on another host, counts as dead."""

_POLL_SECONDS = 0.2
_COMPILERS = ("ninja", "++", "cc1", "clang", "nvcc", "cicc", "ptxas")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOTDIR})


@contextmanager
def own_build_locks() -> Iterator[None]:
    """Have torch build its extensions behind our lock, from now on in this process.

    Raises:
        UserError: in the body, a build found no place to write.
    """
    torch.utils.cpp_extension.FileBaton = BuildLock  # type: ignore[attr-defined]
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        if isinstance(cause, OSError) and cause.errno in _NO_ROOM:
            where = f"{cause.filename}: " if cause.filename else ""
            raise UserError(
                f"DeepSpeed's kernels cannot be built ({where}{cause.strerror}); set TORCH_EXTENSIONS_DIR to a "
                "directory on a disk with room in which this user may write"
            ) from error
        raise


class BuildLock(FileBaton):
    """Takes the place of torch's lock on a build folder, and still keeps it, for programs that know that one alone."""

    def __init__(self, lock_file_path: str, *arguments: Any, **options: Any) -> None:
        super().__init__(lock_file_path, *arguments, **options)
        self._torchs = Path(lock_file_path)
        self._folder = self._torchs.parent
        self._own = ExitStack()

    def try_acquire(self) -> bool:
        """Wait for other builders and become the one; False where another has built meanwhile."""
        own, library = self._folder / _LOCK, self._folder / f"{self._folder.name}.so"
        another_builds = is_held(own)
        lock = advisory_lock(
            own,
            what=f"the extension {self._folder.name}",
            say_after_seconds=_SAY_AFTER_SECONDS,
            patience_seconds=_PATIENCE_SECONDS,
        )
        self._own.enter_context(lock)
        left_behind = self._torchs.exists()
        if another_builds and not left_behind and library.exists():
            return False
        try:
            while not super().try_acquire():
                self._take_over()
            self._torchs.write_text(f"{_LOCK} process {os.getpid()}\n", encoding="ascii")
        except BaseException:
            self._own.close()
            raise
        if not library.exists():
            LOGGER.info("building the extension %s in %s; takes about a minute", self._folder.name, self._folder)
        return True

    def wait(self) -> None:
        """What another has built is there already."""
        self._own.close()

    def release(self) -> None:
        """The build is done, or has failed."""
        try:
            with suppress(FileNotFoundError):
                super().release()
        finally:
            self._own.close()

    def _take_over(self) -> None:
        """Remove torch's lock when nobody builds behind it."""
        said = False
        while (stranger := self._stranger()) is not None:
            if not said:
                LOGGER.warning("waiting for the extension %s, %s (%s)", self._folder.name, stranger, self._torchs)
            said = True
            time.sleep(_POLL_SECONDS)
        with suppress(FileNotFoundError):
            self._torchs.unlink()
            LOGGER.warning("%s was left by a process that has ended; the build is taken over", self._torchs)

    def _stranger(self) -> str | None:
        """Who may still be building, in words; None: nobody, or torch's lock is gone."""
        builder = _builder_in(self._folder, self._torchs)
        if builder is not None:
            return f"which process {builder} builds"
        try:
            if _LOCK in self._torchs.read_text(encoding="ascii", errors="replace"):
                return None  # one of ours has left it: it had the lock that this process holds now
            touched = max(
                path.stat().st_mtime for path in (self._torchs, *self._folder.iterdir()) if path.name != _LOCK
            )
        except FileNotFoundError:
            return None if not self._torchs.exists() else "in which files come and go"
        left = _STRANGERS_SECONDS - (time.time() - touched)
        return f"which nobody builds on this host; it is taken over in {left:.0f} s" if left > 0 else None


def _builder_in(folder: Path, lock: Path) -> int | None:
    """A process of this host, not this one, that has ``lock`` open or compiles in ``folder``: also an orphan does."""
    folder, lock = folder.resolve(), lock.resolve()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with suppress(psutil.Error, OSError):
            compiles = any(name in process.name() for name in _COMPILERS) and process.cwd() == str(folder)
            if compiles or any(file.path == str(lock) for file in process.open_files()):
                return process.pid
    return None
