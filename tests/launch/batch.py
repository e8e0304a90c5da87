"""Batch scripts in real bash, with programs beside them that stand for SLURM's."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_ext.launch.job_script import TrainingJob

# Drops srun's options, then is the only task of the step.
_SRUN = """#!/bin/bash
here=$(dirname "$0")
printf '%s\\0' "$@" >"$here/srun.arguments.$$"
while [[ $1 == --* ]]; do shift; done
export SLURMD_NODENAME=n1 SLURM_PROCID=0
trap 'kill -USR1 $task; pkill -USR1 -P $task' USR1 # every process of the task gets it
"$@" &
task=$!
while kill -0 $task 2>/dev/null; do wait $task; status=$?; done
exit $status
"""
_SCONTROL = """#!/bin/bash
here=$(dirname "$0")
echo "$@" >>"$here/scontrol.arguments"
case $1 in show) echo n1; echo n2 ;; requeue) [ ! -e "$here/refuse" ] || exit 1 ;; esac
"""
_SQUEUE = """#!/bin/bash
cat "$(dirname "$0")/state"
"""
_SINFO = """#!/bin/bash
echo allocated
echo "$(cat "$(dirname "$0")/second.node")"
"""
_SLEEP = """#!/bin/bash
exec /bin/sleep 0.02
"""
# Stands for the ranks' Python: writes down how it was called, then does what its plan says, one line an attempt.
_RANK = """#!{python}
import json, os, signal, sys, time
from pathlib import Path
here = Path({folder!r})
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append("USR1"))
calls = here / "calls.jsonl"
before = len(calls.read_text().splitlines()) if calls.exists() else 0
seen = {{name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "MEGATRON_EXT_REQUEUE", "RANK")}}
with calls.open("a") as file:
    file.write(json.dumps({{"arguments": sys.argv[1:], "cwd": os.getcwd(), **seen}}) + "\\n")
print("a rank was here", flush=True)
plan = json.loads((here / "plan").read_text())
what = plan[min(before, len(plan) - 1)]
if what == "wait for USR1":
    while not stop:
        time.sleep(0.01)
    sys.exit(75)
if what < 0:
    os.kill(os.getpid(), -what)
sys.exit(what)
"""


@dataclass(frozen=True)
class Batch:
    """A folder with the programs, and what was done in it."""

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, text in (
            ("srun", _SRUN),
            ("scontrol", _SCONTROL),
            ("squeue", _SQUEUE),
            ("sinfo", _SINFO),
            ("sleep", _SLEEP),
        ):
            self.program(name, text)
        (self.folder / "state").write_text("RUNNING\n")
        (self.folder / "second.node").write_text("allocated\n")
        self.plan(0)

    def plan(self, *what: int | str) -> None:
        """What a rank does in each attempt: an exit status, a negative signal, or "wait for USR1"."""
        (self.folder / "plan").write_text(json.dumps(what))

    def python(self, name: str = "python") -> str:
        """Path of a program called ``name`` that stands for the ranks' Python."""
        return self.program(name, _RANK.format(python=sys.executable, folder=str(self.folder)))

    def start(self, job: TrainingJob, *, task: int | None = None, restart: int = 0) -> "subprocess.Popen[bytes]":
        """Start the job's script as SLURM would."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM")}
        environment |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "RANK": "7", "SLURM_JOB_ID": "17"}
        environment |= {"SLURM_JOB_NODELIST": "n[1-2]"} | self.environment
        if restart:
            environment["SLURM_RESTART_COUNT"] = str(restart)
        if task is not None:
            environment |= {"SLURM_ARRAY_JOB_ID": "16", "SLURM_ARRAY_TASK_ID": str(task)}
        script = self.folder / "job.sh"
        script.write_bytes(os.fsencode(job.script()))
        return subprocess.Popen(
            ["bash", str(script)], env=environment, cwd="/", stdout=subprocess.PIPE, start_new_session=True
        )

    def run(self, job: TrainingJob, *, task: int | None = None, restart: int = 0) -> tuple[int, str]:
        """Run the job's script to its end: exit status and what it printed."""
        process = self.start(job, task=task, restart=restart)
        output, _ = process.communicate(timeout=60)
        return process.returncode, output.decode(errors="replace")

    def calls(self) -> list[dict[str, Any]]:
        path = self.folder / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def srun_arguments(self) -> list[list[str]]:
        texts = [path.read_bytes() for path in self.folder.glob("srun.arguments.*")]
        return [[os.fsdecode(part) for part in text.split(b"\0")[:-1]] for text in texts]

    def scontrol(self) -> list[list[str]]:
        return [shlex.split(line) for line in (self.folder / "scontrol.arguments").read_text().splitlines()]

    def program(self, name: str, text: str) -> str:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)
        return str(path)


def training_job(folder: Path, batch: Batch, **changes: Any) -> TrainingJob:
    run_dir = folder / "run"
    (run_dir / "slurm").mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "name": "run",
        "run_dirs": (run_dir,),
        "work_dir": folder,
        "output": run_dir / "slurm",
        "python": batch.python(),
    }
    return TrainingJob(**(given | changes))
