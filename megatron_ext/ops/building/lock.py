"""A lock between processes, on any file system, that never hangs: it names its owner and shows that the owner lives.

The lock is a file made with O_EXCL that holds host, process id and the process's start time, and that the owner
touches while it works. It is stale when its owner is a process of this host that has ended (a reused id is told apart
by the start time), or when nobody has touched it for ``silence`` seconds: how long is measured by the one who waits,
with one clock, so that clocks which differ between hosts do not matter.

Two processes that find the same lock stale may both come to hold it. What the lock protects must allow that: here
builds, each in a folder of its own, of which the first to finish is published.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock."""

    host: str
    pid: int
    started: float
    """When the process started, in seconds since the epoch by its host's clock."""

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time())

    @property
    def has_ended(self) -> bool:
        """Whether it is a process of this host that is gone."""
        if self.host != socket.gethostname():
            return False
        try:
            process = psutil.Process(self.pid)
            return abs(process.create_time() - self.started) > 1 or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class Patience:
    """How long to wait, in seconds."""

    silence: float = 60.0
    """A lock that was not touched for so long is stale."""

    total: float = 1800.0
    """Longer than this nobody waits for a lock: an owner that lives may hang."""

    poll: float = 0.2
    """Between two looks; the owner touches the lock ten times in ``silence``."""


_DEFAULT = Patience()


@contextmanager
def build_lock(path: Path, done: Callable[[], bool], patience: Patience = _DEFAULT) -> Iterator[bool]:
    """Hold the lock ``path``, or stop waiting for it because ``done()``.

    Yields:
        Whether the work is this process's to do: False where ``done()`` came true meanwhile.
    """
    if not _acquire(path, done, patience):
        yield False
        return
    ended = threading.Event()
    beat = threading.Thread(target=_touch_until, args=(path, ended, patience.silence / 10), daemon=True)
    beat.start()
    try:
        yield True
    finally:
        ended.set()
        beat.join()
        # Not one that another has made after taking this process for dead.
        if read_owner(path) == Owner.here():
            path.unlink(missing_ok=True)


def read_owner(path: Path) -> Owner | None:
    """Who holds the lock; None where there is none, or it is just being written or was cut off."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _acquire(path: Path, done: Callable[[], bool], patience: Patience) -> bool:
    start = quiet_since = time.monotonic()
    seen: object = None
    while not done():
        if _create(path):
            # Published between the look and the lock.
            if not done():
                return True
            path.unlink(missing_ok=True)
            return False
        now, state = time.monotonic(), _state(path)
        if state != seen:
            seen, quiet_since = state, now
        owner = read_owner(path)
        hangs = now - quiet_since > patience.silence or now - start > patience.total
        if hangs or (owner is not None and owner.has_ended):
            path.unlink(missing_ok=True)
        else:
            time.sleep(patience.poll)
    return False


def _create(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(asdict(Owner.here()), file)
    return True


def _state(path: Path) -> object:
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns, status.st_size
    return None


def _touch_until(path: Path, ended: threading.Event, every: float) -> None:
    while not ended.wait(every):
        with suppress(OSError):
            os.utime(path)
