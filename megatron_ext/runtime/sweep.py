"""Signals to what a job has running on a host; runs on the host, over ssh, or in place.

``python -m megatron_ext.runtime.sweep '[JOB, SIGNAL]'`` prints how many processes it has reached. A process belongs to
the job whose id it carries in its environment.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

JOB = "MEGATRON_EXT_JOB"
"""Variable with the id of the job, which every process of it has on every host."""

WORKER = "megatron_ext.worker"


def sweep(job: str, number: int) -> int:
    """Send a signal to the job's processes here and return to how many it went.

    SIGKILL goes to all of them; any other signal to the ranks alone, which know what to do with it.
    """
    reached = 0
    for pid in _processes_of(job):
        if number != signal.SIGKILL and not _is_rank(pid):
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
            reached += 1
    return reached


def _processes_of(job: str) -> Iterator[int]:
    mark = f"{JOB}={job}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        # The launcher's own process carries the worker's name in its arguments too.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return WORKER in words and not any("deepspeed" in word for word in words[: words.index(WORKER)])
    return False


if __name__ == "__main__":
    job_id, signal_number = json.loads(sys.argv[1])
    print(sweep(job_id, signal_number))  # noqa: T201
