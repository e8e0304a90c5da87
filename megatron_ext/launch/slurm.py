"""SLURM: its programs as functions, the submission of jobs, and what a run directory remembers of them.

Nothing else of this package starts sbatch, squeue or scancel. ``slurm/`` of a run directory holds ``config.json``, what
a job trains, ``job.sh``, its script, ``JOB/HOST-rankN.log``, what each rank printed, ``JOB.out``, what the script did,
and ``jobs.jsonl``, a line for each thing that happened: ``submitted`` lines are written by the command that submits;
``started``, ``failed`` (another attempt follows), ``requeued`` and ``ended`` by the job itself.
"""

import json
import os
import os.path
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from megatron_ext.config.resolved import resolved_json
from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.launch.job_script import Container, Resources, TrainingJob
from megatron_ext.runtime.files import replace_text, replacing

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

FOLDER = "slurm"
_JOBS = "jobs.jsonl"
_COMMAND_SECONDS = 120
_FIELDS = ("%i", "%T", "%r", "%N", "%S", "%L")
# No field that is asked for holds one.
_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class QueuedJob:
    """A job as squeue shows it."""

    job: str  # number, of an array's task NUMBER_TASK
    state: str  # SLURM's word: PENDING, RUNNING, COMPLETING
    reason: str = ""  # why it waits; "None" where it does not
    nodes: str = ""  # nodes it runs on, in SLURM's short form
    start: str = ""  # when it began or is expected to; "N/A" where the controller does not know
    time_left: str = ""  # until its time limit

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

    ``options`` are those of sbatch beside the script's own. Raises UserError if sbatch refuses the job, with SLURM's
    message and ``remedy``, what a user can change.
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


@dataclass(frozen=True)
class JobRecord:
    """The last job of a run, and the last that is known of it."""

    job: str  # number, of an array's task NUMBER_TASK
    event: str  # submitted, started, failed, requeued or ended
    status: int | None = None  # exit status, of a job that ended or an attempt that failed
    restart: int = 0  # how often SLURM has started it again
    nodes: str = ""
    time: str = ""  # UTC, ISO 8601

    @property
    def failed(self) -> bool:
        """Whether it ended with a failure."""
        return self.event == "ended" and self.status not in {None, 0, 75}

    @property
    def may_be_queued(self) -> bool:
        """Whether the queue may hold it: also after its end, where SLURM itself starts it again."""
        return self.event != "ended" or self.status != 0


def config_file(run_dir: Path) -> Path:
    """The config that a job of the run trains."""
    return run_dir / FOLDER / "config.json"


def jobs_of(run_dir: Path) -> list[JobRecord]:
    """Every job of the run, each as it was last heard of, in the order in which they were first named."""
    try:
        lines = (run_dir / FOLDER / _JOBS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, JobRecord] = {}
    for line in lines:
        record = _record(line)
        if record is not None:
            # The queue is faster than the command that submitted: "started" may come first.
            if record.event == "submitted" and record.job in found:
                continue
            found[record.job] = record
    return list(found.values())


def _record(line: str) -> JobRecord | None:
    """The record in a line, or None where it holds none: another process may be writing it."""
    try:
        values = json.loads(line)
        return JobRecord(
            job=str(values["job"]),
            event=str(values["event"]),
            status=None if values.get("status") is None else int(values["status"]),
            restart=int(values.get("restart") or 0),
            nodes=str(values.get("nodes", "")),
            time=str(values.get("time", "")),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def training_job(
    configs: Sequence[RunConfig], resources: Resources, *, container: Container | None = None, python: str | None = None
) -> TrainingJob:
    """The job that trains ``configs``, called after the first of them; ``python`` is what the ranks start."""
    run_dirs = tuple(absolute(config.run_dir) for config in configs)
    return TrainingJob(
        name=configs[0].name,
        run_dirs=run_dirs,
        work_dir=absolute(Path()),
        output=run_dirs[0] / FOLDER,
        python=python or ("python3" if container else sys.executable),
        resources=resources,
        container=container,
    )


def submit_job(
    job: TrainingJob, configs: Sequence[RunConfig], *, options: Sequence[str] = (), follows: bool = False
) -> str:
    """Write what the job of ``configs`` needs into their run directories, submit it, and return its number.

    ``options`` are those of sbatch beside the script's own. A job that ``follows`` waits for another one of the same
    runs, which therefore may be in the queue. Raises UserError if there is no SLURM here, a run is in the queue
    already, or sbatch refuses the job.
    """
    require_slurm("a SLURM job")
    if not follows:
        for run_dir, number in live_jobs(job.run_dirs).items():
            raise UserError(f"{run_dir} has job {number} in the queue; wait for it, or end it with `scancel {number}`")
    script = job.script()
    for run_dir, config in zip(job.run_dirs, configs, strict=True):
        prepare(run_dir, config=resolved_json(config), script=script)
    job.output.mkdir(parents=True, exist_ok=True)
    number = submit(script, options, remedy="Change the options of this command")
    for run_dir, name in zip(job.run_dirs, job.names(number), strict=True):
        record_submitted(run_dir, name)
    return number


def prepare(run_dir: Path, *, config: str, script: str) -> None:
    """Write what a job of the run needs."""
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    replace_text(config_file(run_dir), config)
    with replacing(run_dir / FOLDER / "job.sh") as file:
        # Paths in it are bytes to the system.
        file.write(os.fsencode(script))


def record_submitted(run_dir: Path, job: str) -> None:
    """Remember that a job for the run was submitted."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    line = {"event": "submitted", "job": job, "status": None, "restart": 0, "nodes": "", "time": now}
    with (run_dir / FOLDER / _JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def live_jobs(run_dirs: Sequence[Path]) -> dict[Path, str]:
    """The job of each run that has one in the queue, or perhaps has: the controller may not answer."""
    jobs = {run_dir: [job.job for job in jobs_of(run_dir) if job.may_be_queued] for run_dir in run_dirs}
    found = queue(job for names in jobs.values() for job in names)
    alive = {
        run_dir: next((name for name in names if not found[name].is_over), None) for run_dir, names in jobs.items()
    }
    return {run_dir: name for run_dir, name in alive.items() if name is not None}


def absolute(path: Path) -> Path:
    """``path`` from the root on, symbolic links as the user wrote them: a node may reach them another way."""
    return Path(os.path.abspath(path))  # noqa: PTH100 - resolve() would follow links
