"""A cluster of three nodes with SLURM, and a small run on it, for the tests of this folder."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.launch.slurm import jobs_of
from tests.cluster.lab import ROOT, Lab, LabOptions, why_not
from tests.train.small_run import corpus_data, train_records, write_config

_SLURM_LINES = """PreemptType=preempt/partition_prio
PreemptMode=REQUEUE"""

# Long enough that a command reaches the run between its first steps and its end, also on a busy machine.
STEPS = 100
LONG: dict[str, Any] = {"training": {"seq_len": 32, "batch_size": 8, "duration": {"steps": STEPS}}}


@dataclass(frozen=True)
class Cluster:
    """The lab, with the commands of this program called on its login node."""

    lab: Lab

    def cli(self, *arguments: str, timeout: float = 120.0) -> str:
        """What a command of this program prints; it has to succeed."""
        done = self.lab.run([sys.executable, "-m", "megatron_ext", *arguments], timeout=timeout, env=self.environment)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def environment(self) -> dict[str, str]:
        return {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    def submit(self, config: Path, *options: str) -> list[str]:
        """Numbers of the jobs of a run that is submitted on two nodes."""
        output = self.cli("submit", str(config), "--nodes", "2", "--time", "10", *options)
        return [word for word in output.splitlines()[0].partition(";")[0].split() if word.isdigit()]

    def status(self, run: Path) -> dict[str, Any]:
        found = json.loads(self.cli("status", str(run), "--json"))
        assert isinstance(found, dict)
        return found

    def slurm(self, *command: str) -> str:
        done = self.lab.run(command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout.strip()

    def state(self, job: str) -> str:
        return self.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T")

    def wait_for_step(self, run: Path, step: int) -> None:
        self.wait(lambda: any(record["step"] >= step for record in train_records(run)), f"step {step}", run)

    def wait_for_end(self, run: Path, *, events: tuple[str, ...] = ("ended",)) -> None:
        """Return when the last thing that a job of the run wrote down is one of ``events``."""
        self.wait(lambda: _last_event(run) in events, f"end of the run, not {_last_event(run)}", run)

    def wait_for_restart(self, run: Path) -> None:
        """Return when the second life of the run's job has begun."""
        self.wait(lambda: jobs_of(run)[-1].restart == 1, "second life of the job", run)

    def wait(self, there: Callable[[], bool], what: str, run: Path, *, timeout: float = 240.0) -> None:
        """Return when it is so; AssertionError with the job's output when time runs out."""
        deadline = time.monotonic() + timeout
        while not there():
            if time.monotonic() > deadline:
                texts = "".join(
                    f"\n--- {path}\n{path.read_text()[-3000:]}" for path in sorted(run.rglob("slurm/**/*.*"))
                )
                raise AssertionError(f"no {what} in {timeout:.0f} s: {self.slurm('squeue')}{texts}")
            time.sleep(0.2)


def _last_event(run: Path) -> str:
    try:
        line = (run / "slurm" / "jobs.jsonl").read_text().splitlines()[-1]
    except (OSError, IndexError):
        return ""
    return str(json.loads(line)["event"])


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Three nodes, n1 to n3, each with two CPUs and two devices that pass for GPUs; skips where there can be none."""
    if reason := why_not(slurm=True):
        pytest.skip(reason)
    with Lab(LabOptions(hosts=3, slurm=True, gpus=2, slurm_lines=_SLURM_LINES)) as lab:
        yield Cluster(lab)


def small_config(folder: Path, corpus: Path, **sections: Any) -> Path:
    """A run of 40 steps in ``folder / "small"``, long enough to be interrupted."""
    path = write_config(folder, data=corpus_data(corpus), **sections)
    tree = json.loads(path.read_text())
    # What is tested here is no matter of kernels, and needs none to be built.
    tree["model"]["kernels"] = "reference"
    path.write_text(json.dumps(tree))
    return path


@pytest.fixture(scope="session")
def straight(cluster: Cluster, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Records of the same run on two ranks of one host, through the deepspeed launcher."""
    folder = tmp_path_factory.mktemp("straight")
    config = small_config(folder, corpus, **LONG)
    command = [sys.executable, "-m", "megatron_ext", "train", str(config), "--nproc", "2"]
    done = cluster.lab.run(command, env=cluster.environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return train_records(folder / "small")
