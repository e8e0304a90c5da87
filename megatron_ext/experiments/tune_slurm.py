"""Probes as jobs of a SLURM cluster, one after the other, from a login node that sees the probes' directories."""

import hashlib
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from megatron_ext.slurm import commands
from megatron_ext.slurm.quoting import word, words

_QUERY_SECONDS = 10.0
"""Between questions to the controller, which many users share."""
_GRACE_SECONDS = 60.0
"""Until a job that is gone without a status counts as failed: files of another machine may come late."""
# The shell takes the signal, passes it on, and tells how the run ended, which squeue does not.
_SCRIPT = """#!/bin/bash
{command} &
pid=$!
trap 'stopping=1; kill -TERM "$pid"' TERM
while :; do
  stopping=
  wait "$pid"
  status=$?
  [ -n "$stopping" ] || break
done
echo "$status" > {status}.partial && mv {status}.partial {status}
exit "$status"
"""


@dataclass(frozen=True)
class SlurmRunner:
    """Runs as jobs of one node; on several, GPUs of one machine are what ``megatron-ext train`` starts ranks for."""

    options: tuple[str, ...]
    """What sbatch is given: partition, GPUs, time and the like."""

    ranks: int | None = None
    """Ranks of a job; None: one per GPU of its node."""

    program: tuple[str, ...] = (sys.executable, "-m", "megatron_ext", "train")
    """What trains the config that follows it."""

    def start(self, config: Path, *, output: Path) -> "SlurmJob":
        """Submit the run in the file ``config``; it begins after a job for the same file that may still be there.

        Raises:
            UserError: SLURM's programs are missing, or sbatch refused the job.
        """
        commands.require_slurm("--slurm")
        config, output = config.resolve(), output.resolve()
        ranks = () if self.ranks is None else ("--nproc", str(self.ranks))
        # SLURM's number is known to the job alone before it begins.
        status = f"{word(str(output))}.$SLURM_JOB_ID.status"
        script = _SCRIPT.format(command=words((*self.program, str(config), *ranks)), status=status)
        name = "megatron-ext-" + hashlib.sha256(str(config).encode()).hexdigest()[:12]
        pattern = str(output).replace("%", "%%")
        options = [
            *("--nodes=1", "--ntasks=1", "--no-requeue", "--signal=B:TERM@120"),
            *(*self.options, f"--job-name={name}", "--dependency=singleton"),
            *(f"--output={pattern}", f"--error={pattern}", "--open-mode=append"),
        ]
        number = commands.submit(script, options, remedy="Change --slurm")
        return SlurmJob(number, Path(f"{output}.{number}.status"))


@dataclass
class SlurmJob:
    """A job that was submitted."""

    number: str
    status: Path
    """File into which the job writes its exit status."""

    _asked: float = field(default=-_QUERY_SECONDS, init=False)
    _gone_since: float | None = field(default=None, init=False)

    def poll(self) -> int | None:
        """Exit status of the run (1 where the job ended without one), or None while it waits or goes on."""
        if self.status.exists():
            return int(self.status.read_text())
        now = time.monotonic()
        if now - self._asked < _QUERY_SECONDS:
            return None
        self._asked = now
        if self._state() not in commands.OVER:
            self._gone_since = None
            return None
        self._gone_since = now if self._gone_since is None else self._gone_since
        return 1 if now - self._gone_since >= _GRACE_SECONDS else None

    def ask_to_stop(self) -> bool:
        """Ask the run to finish its step, save and exit; a job that has not begun is taken back."""
        state = self._state()
        if state == "PENDING":
            return commands.cancel(self.number)
        return commands.signal_batch(self.number, "TERM") or state in commands.OVER

    def close(self) -> None:
        """Cancel it if it has not ended."""
        if not self.status.exists() and self._state() not in commands.OVER:
            commands.cancel(self.number)
        self.status.unlink(missing_ok=True)

    def _state(self) -> str:
        """SLURM's word for it."""
        return commands.queue([self.number])[self.number].state
