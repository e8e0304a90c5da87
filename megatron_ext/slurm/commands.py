"""SLURM's programs (sbatch, squeue, scancel) as functions; nothing else of this package starts them."""

import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from megatron_ext.errors import UserError

PROGRAMS: Final = ("sbatch", "squeue", "scancel")
UNKNOWN: Final = "UNKNOWN"
"""State of a job about which the controller did not answer."""
COMPLETED: Final = "COMPLETED"
"""State of a job that the controller does not know any more: it ended some time ago, in whatever way."""
OVER: Final = frozenset(
    {
        *("BOOT_FAIL", "CANCELLED", COMPLETED, "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
        *("REVOKED", "TIMEOUT"),
    }
)
"""States that a job does not leave."""

_COMMAND_SECONDS = 120
_FIELDS = ("%i", "%T", "%r", "%N", "%S", "%L")
# No field that is asked for holds one.
_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    job: str
    """Number, of an array's task NUMBER_TASK."""

    state: str
    """SLURM's word: PENDING, RUNNING, COMPLETING..."""

    reason: str = ""
    """Why it waits; "None" where it does not."""

    nodes: str = ""
    """Nodes it runs on, in SLURM's short form."""

    start: str = ""
    """When it began or is expected to; "N/A" where the controller does not know."""

    time_left: str = ""
    """Until its time limit."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state in OVER


def require_slurm(asked_by: str) -> None:
    """Raise UserError where SLURM's programs are not on PATH; ``asked_by`` is the option or command that needs them."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        raise UserError(
            f"{asked_by} needs {' and '.join(missing)}, not on PATH: call it on a login node of the cluster"
        )


def has_slurm() -> bool:
    """Whether SLURM's programs are there."""
    return all(shutil.which(name) for name in PROGRAMS)


def submit(script: str, options: Sequence[str] = (), *, remedy: str) -> str:
    """Submit a batch script and return its job number.

    Args:
        script: text of the script.
        options: options of sbatch beside the script's own.
        remedy: what a user can change when sbatch refuses.

    Raises:
        UserError: sbatch refused the job; the message is SLURM's.
    """
    done = _call(["sbatch", "--parsable", *options], script)
    number = done.stdout.strip().split(";")[0]
    if done.returncode or not number.isdigit():
        raise UserError(f"sbatch refused the job: {done.stderr.strip() or done.stdout.strip()}. {remedy}")
    return number


def queue(jobs: Iterable[str]) -> dict[str, QueuedJob]:
    """What the controller says about ``jobs``, by their numbers.

    A job that it does not know is COMPLETED, and every job is UNKNOWN where it does not answer.
    """
    wanted = list(dict.fromkeys(jobs))
    if not wanted:
        return {}
    fields = _SEPARATOR.join(_FIELDS)
    done = _call(["squeue", "--noheader", "--array", f"--jobs={','.join(wanted)}", f"--format={fields}"])
    silent = bool(done.returncode) and "invalid job id" not in done.stderr.lower()
    found = {job: QueuedJob(job, UNKNOWN if silent else COMPLETED) for job in wanted}
    for line in () if silent else done.stdout.splitlines():
        parts = [part.strip() for part in line.split(_SEPARATOR)]
        if len(parts) == len(_FIELDS) and parts[0] in found:
            found[parts[0]] = QueuedJob(*parts)
    return found


def cancel(job: str) -> bool:
    """Take a job back or end it; whether the controller was asked."""
    return _call(["scancel", job]).returncode == 0


def signal_batch(job: str, name: str) -> bool:
    """Send a signal to the job's batch script alone; whether the controller was asked."""
    return _call(["scancel", "--batch", f"--signal={name}", job]).returncode == 0


def _call(command: list[str], text: str = "") -> "subprocess.CompletedProcess[str]":
    try:
        # Paths are bytes to the system: what is no UTF-8 in them has to come out of here as it came in.
        done = subprocess.run(
            command, input=os.fsencode(text), capture_output=True, check=False, timeout=_COMMAND_SECONDS
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} did not answer in {_COMMAND_SECONDS} seconds")
    except OSError as error:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} cannot be started: {error}")
    output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(command, done.returncode, output, errors)
