"""One job at a time in a run directory."""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from megatron_ext.errors import UserError

_FILE = ".lock"
_POLL_SECONDS = 0.1


@contextmanager
def run_lock(run_dir: Path, *, wait_seconds: float = 1.0) -> Iterator[None]:
    """Hold ``run_dir`` for this process while the body runs; the directory is made.

    The lock is the kernel's and ends with the process that holds it, however that ends, so that a killed job never
    keeps its successor out. The file stays and names the last holder.

    Args:
        run_dir: The run's directory.
        wait_seconds: How long a holder is waited for: ``is_locked`` of another process holds it for a moment, and a job
            that the cluster starts again may meet ranks of its first life that are still being killed.

    Raises:
        UserError: another live process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _FILE).open("a+") as file:
        if not _lock(file, wait_seconds):
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by another job ({file.read().strip()}); wait for it, stop it, or give this run "
                "another name"
            )
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
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
    try:
        with (run_dir / _FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
