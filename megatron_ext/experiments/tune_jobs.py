"""Where probes are trained: this machine, or jobs of a SLURM cluster, one after the other."""

import hashlib
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from megatron_ext.config.run import RunConfig
from megatron_ext.launch import slurm
from megatron_ext.launch.job_script import Resources
from megatron_ext.launch.launcher import Target, start_ranks

_QUERY_SECONDS = 10.0
"""Between questions to the controller, which many users share."""
_GRACE_SECONDS = 60.0
"""Until a job that is gone without a status counts as failed: files of another machine may come late."""
_SIGNAL_SECONDS = 120
"""Before the time limit; a probe is small."""
_GPUS = re.compile(r"(?:--gres|--gpus(?:-per-node)?|-G)[= ]?(?:gpu:)?(?:[A-Za-z_][\w.-]*:)?(?P<count>\d+)")


class Job(Protocol):
    """A run that was started."""

    def poll(self) -> int | None:
        """Its exit status, or None while it goes on."""

    def ask_to_stop(self) -> bool:
        """Ask it to finish its step, save and exit; whether it could be asked yet. May be asked again."""

    def close(self) -> None:
        """Leave nothing of it behind."""


class Runner(Protocol):
    """Starts runs. Their directories are visible to the process that searches."""

    def start(self, config: RunConfig, *, output: Path) -> Job:
        """Start the run; what it prints is appended to ``output``.

        Raises:
            UserError: it cannot be started.
        """


@dataclass(frozen=True)
class LocalRunner:
    """Runs on this machine through the deepspeed launcher."""

    target: Target

    def start(self, config: RunConfig, *, output: Path) -> Job:
        """Start the run's ranks."""
        return start_ranks(self.target, config, output=output)


@dataclass(frozen=True)
class SlurmRunner:
    """Runs as jobs of one node, from a login node."""

    options: tuple[str, ...]
    """What sbatch is given: partition, GPUs, time and the like."""

    ranks: int | None = None
    """Ranks of a job; None: one per GPU that the options ask for, or one."""

    def start(self, config: RunConfig, *, output: Path) -> "SlurmJob":
        """Submit the run; it begins after a job for the same run that may still be there.

        Raises:
            UserError: SLURM's programs are missing, or sbatch refused the job.
        """
        resources = Resources(tasks_per_node=self.ranks or _gpus(self.options), signal_seconds=_SIGNAL_SECONDS)
        run_dir = slurm.absolute(config.run_dir)
        job = replace(
            slurm.training_job([config], resources),
            name="megatron-ext-" + hashlib.sha256(str(run_dir).encode()).hexdigest()[:12],
            dependency="singleton",
            requeue=False,
        )
        pattern = str(slurm.absolute(output)).replace("%", "%%")
        options = [f"--output={pattern}", *self.options]
        return SlurmJob(slurm.submit_job(job, [config], options=options, follows=True), run_dir)


def _gpus(options: Iterable[str]) -> int:
    found = _GPUS.search(" ".join(options))
    return int(found["count"]) if found else 1


@dataclass
class SlurmJob:
    """A job that was submitted; what it has come to stands in the run's directory."""

    number: str
    run_dir: Path

    _asked: float = field(default=-_QUERY_SECONDS, init=False)
    _gone_since: float | None = field(default=None, init=False)

    def poll(self) -> int | None:
        """Exit status of the run (1 where the job ended without one), or None while it waits or goes on."""
        if (status := self._status()) is not None:
            return status
        now = time.monotonic()
        if now - self._asked < _QUERY_SECONDS:
            return None
        self._asked = now
        if self._state() not in slurm.OVER:
            self._gone_since = None
            return None
        self._gone_since = now if self._gone_since is None else self._gone_since
        return 1 if now - self._gone_since >= _GRACE_SECONDS else None

    def ask_to_stop(self) -> bool:
        """Ask the run to finish its step, save and exit; a job that has not begun is taken back."""
        state = self._state()
        if state == "PENDING":
            return slurm.cancel(self.number)
        # As before a time limit: the script passes it on until the ranks have ended.
        return slurm.signal_batch(self.number, "USR1") or state in slurm.OVER

    def close(self) -> None:
        """Cancel it if it has not ended."""
        if self._status() is None and self._state() not in slurm.OVER:
            slurm.cancel(self.number)

    def _status(self) -> int | None:
        (job,) = (job for job in slurm.jobs_of(self.run_dir) if job.job == self.number)
        return job.status if job.event == "ended" else None

    def _state(self) -> str:
        return slurm.queue([self.number])[self.number].state
