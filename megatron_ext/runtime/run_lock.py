"""One job at a time in a run directory, or at what another file stands for.

Not ``filelock``: it has no shared lock with which to look without being in the way, and where a file system knows no
flock it goes over to files that outlive a killed holder.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from megatron_ext.errors import UserError
from megatron_ext.runtime.log import LOGGER

_FILE = ".lock"
_POLL_SECONDS = 0.1

FAILURE_RECORD = "failure.json"
"""File of the run directory that says what ended the last job, where something did."""


class HeldError(Exception):
    """Another live process holds the lock; the text names it."""


@contextmanager
def run_lock(run_dir: Path, *, wait_seconds: float = 1.0) -> Iterator[None]:
    """Hold ``run_dir`` for this process while the body runs.

    The directory is made, and the record of what ended the job before is removed.

    Args:
        run_dir: The run's directory.
        wait_seconds: How long a holder is waited for: ``is_locked`` of another process holds it for a moment, and a job
            that the cluster starts again may find ranks of its first life that are still being killed.

    Raises:
        UserError: another live process holds it, or it cannot be made.
    """
    with ExitStack() as lock:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            lock.enter_context(file_lock(run_dir / _FILE, wait_seconds=wait_seconds))
        except HeldError as holder:
            raise UserError(
                f"{run_dir} is in use by another job ({holder}); wait for it, stop it, or give this run another name"
            ) from None
        except (OSError, ValueError) as error:
            from megatron_ext.runtime.places import unwritable

            raise unwritable(run_dir, error) from None
        with suppress(OSError):
            (run_dir / FAILURE_RECORD).unlink(missing_ok=True)
        yield


@contextmanager
def file_lock(path: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the lock at ``path`` for this process while the body runs.

    The lock is the kernel's and ends with the process that holds it, however that ends, so that a killed job never
    keeps its successor out. The file stays and names the last holder.

    Raises:
        HeldError: another live process holds it.
    """
    with path.open("a+") as file:
        if not _lock(file, wait_seconds):
            file.seek(0)
            raise HeldError(file.read().strip())
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


@contextmanager
def advisory_lock(path: Path, *, what: str, say_after_seconds: float, patience_seconds: float) -> Iterator[None]:
    """Hold a lock that only saves work, or go on without it: after a time, or where the file system has no locks.

    Args:
        path: Its file.
        what: What its holder makes, for the log, which says after ``say_after_seconds`` for whom this process waits.
        say_after_seconds: See above.
        patience_seconds: How long a holder is waited for.
    """
    with ExitStack() as held:
        try:
            try:
                held.enter_context(file_lock(path, wait_seconds=say_after_seconds))
            except HeldError as holder:
                LOGGER.info("waiting for %s, which another process makes (%s; lock %s)", what, holder, path)
                held.enter_context(file_lock(path, wait_seconds=patience_seconds))
        except HeldError as holder:
            LOGGER.warning("%s was held for %.0f s (%s); going on without it", path, patience_seconds, holder)
        except OSError as error:
            LOGGER.warning("%s cannot be locked (%s); going on without it", path, error)
        yield


def _lock(file: IO[str], wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def is_locked(run_dir: Path) -> bool:
    """Whether a live process holds ``run_dir``."""
    return is_held(run_dir / _FILE)


def is_held(path: Path) -> bool:
    """Whether a live process holds the lock at ``path``."""
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
