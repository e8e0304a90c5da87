"""What a run directory remembers of its jobs: ``slurm/jobs.jsonl``, a line for each thing that happened.

``submitted`` lines are written by the command that submits; ``started``, ``failed`` (another attempt follows),
``requeued`` and ``ended`` by the job itself. ``slurm/config.json`` is what it trains, ``slurm/job.sh`` its script,
``slurm/JOB/HOST-rankN.log`` what each rank printed, ``slurm/JOB.out`` what the script did.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_ext.runtime.files import replace_text, replacing

FOLDER = "slurm"
_JOBS = "jobs.jsonl"


@dataclass(frozen=True)
class JobRecord:
    """The last job of a run, and the last that is known of it."""

    job: str
    """Number, of an array's task NUMBER_TASK."""

    event: str
    """submitted, started, failed, requeued or ended."""

    status: int | None = None
    """Exit status, of a job that ended or an attempt that failed."""

    restart: int = 0
    """How often SLURM has started it again."""

    nodes: str = ""
    time: str = ""
    """UTC, ISO 8601."""

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


def prepare(run_dir: Path, *, config: Mapping[str, Any], script: str) -> None:
    """Write what a job of the run needs."""
    folder = run_dir / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(config_file(run_dir), json.dumps(config, indent=1) + "\n")
    with replacing(folder / "job.sh") as file:
        # Paths in it are bytes to the system.
        file.write(os.fsencode(script))


def record_submitted(run_dir: Path, job: str) -> None:
    """Remember that a job for the run was submitted."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    line = {"event": "submitted", "job": job, "status": None, "restart": 0, "nodes": "", "time": now}
    with (run_dir / FOLDER / _JOBS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


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
