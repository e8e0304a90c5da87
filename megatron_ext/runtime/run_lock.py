"""One job at a time in a run directory."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_ext.errors import UserError

_FILE = ".lock"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold ``run_dir`` for this process while the body runs; the directory is made.

    The lock is the kernel's and ends with the process that holds it, however that ends, so that a killed job never
    keeps its successor out. The file stays and names the last holder.

    Raises:
        UserError: another live process holds it.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _FILE).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by another job ({file.read().strip()}); wait for it, stop it, or give this run "
                "another name"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
