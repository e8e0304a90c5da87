"""Probes as SLURM jobs: the script of `submit`, on programs that do what SLURM's do with processes of this machine."""

import shlex
import sys
import time
from pathlib import Path

import pytest

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.experiments import tune_jobs
from megatron_ext.experiments.tune_jobs import SlurmJob, SlurmRunner
from megatron_ext.launch.slurm import config_file, jobs_of
from tests.config.builders import small_config
from tests.launch.batch import Batch

_SBATCH = """#!/bin/bash
here=$(dirname "$0")
echo "$@" > "$here/arguments"
for option in "$@"; do case "$option" in
  --output=*) output="${option#--output=}";;
  --partition=closed) echo "sbatch: error: invalid partition" >&2; exit 1;;
esac; done
cat > "$here/script"
export SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
[ -e "$here/hold" ] || { setsid bash "$here/script" >> "$output" 2>&1 < /dev/null & echo $! > "$here/pid"; }
echo "7;cluster"
"""
_SQUEUE = r"""#!/bin/bash
here=$(dirname "$0")
[ -e "$here/silent" ] && { echo "squeue: error: unable to contact the controller" >&2; exit 1; }
say() { printf '7\x1f%s\x1fNone\x1f\x1f\x1f\n' "$1"; exit; }
[ -e "$here/hold" ] && say PENDING
if [ -e "$here/pid" ] && kill -0 "$(cat "$here/pid")" 2>/dev/null; then say RUNNING; fi
echo "slurm_load_jobs error: Invalid job id specified" >&2
exit 1
"""
_SCANCEL = """#!/bin/bash
here=$(dirname "$0")
echo "$@" >> "$here/cancelled"
rm -f "$here/hold"
[ -e "$here/pid" ] || exit 0
case "$*" in *--batch*) kill -USR1 "$(cat "$here/pid")";; *) kill -KILL -- "-$(cat "$here/pid")";; esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    batch = Batch(tmp_path / "programs")
    for name, text in (("sbatch", _SBATCH), ("squeue", _SQUEUE), ("scancel", _SCANCEL)):
        batch.program(name, text)
    monkeypatch.setenv("PATH", str(batch.folder), prepend=":")
    monkeypatch.setattr(sys, "executable", batch.python())
    monkeypatch.setattr(tune_jobs, "_QUERY_SECONDS", 0.0)
    monkeypatch.setattr(tune_jobs, "_GRACE_SECONDS", 0.5)
    return batch


def probe(folder: Path) -> RunConfig:
    return small_config(output_dir=str(folder / "a folder"))


def submit(folder: Path, *options: str, ranks: int | None = 4) -> SlurmJob:
    return SlurmRunner(options, ranks=ranks).start(probe(folder), output=folder / "a probe.out")


def end(job: SlurmJob) -> int:
    deadline = time.monotonic() + 60
    while (status := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return status


def wait_for_rank(batch: Batch) -> None:
    deadline = time.monotonic() + 60
    while not batch.calls():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_tells_its_status_and_its_output(cluster: Batch, tmp_path: Path) -> None:
    cluster.plan(2)
    job = submit(tmp_path, "--partition=gpu", "--comment=two words")
    assert end(job) == 2
    assert "a rank was here" in (tmp_path / "a probe.out").read_text(), "what the rank said last"
    config = config_file(probe(tmp_path).run_dir)
    assert cluster.calls()[0]["arguments"] == ["-m", "megatron_ext.worker", str(config)]
    assert "--partition=gpu --comment=two words" in (cluster.folder / "arguments").read_text()
    script = (cluster.folder / "script").read_text()
    assert {"#SBATCH --dependency=singleton", "#SBATCH --ntasks-per-node=4", "requeue=0"} <= {
        line.partition("  ")[0] for line in script.splitlines()
    }
    job.close()
    assert not (cluster.folder / "cancelled").exists()


def test_a_job_that_is_asked_to_stop_saves_first(cluster: Batch, tmp_path: Path) -> None:
    cluster.plan("wait for USR1")
    job = submit(tmp_path)
    wait_for_rank(cluster)
    assert job.poll() is None
    assert job.ask_to_stop()
    assert end(job) == 75
    assert [found.event for found in jobs_of(probe(tmp_path).run_dir)] == ["ended"]
    assert (cluster.folder / "cancelled").read_text().split() == ["--batch", "--signal=USR1", "7"]


def test_a_job_that_waits_is_taken_back(cluster: Batch, tmp_path: Path) -> None:
    (cluster.folder / "hold").touch()
    job = submit(tmp_path)
    assert job.poll() is None
    assert job.ask_to_stop()
    assert (cluster.folder / "cancelled").read_text().split() == ["7"]
    assert end(job) == 1


def test_a_job_that_is_gone_without_a_word_has_failed_and_a_silent_controller_says_nothing(
    cluster: Batch, tmp_path: Path
) -> None:
    cluster.plan("wait for USR1")
    job = submit(tmp_path)
    wait_for_rank(cluster)
    job.close()
    (cluster.folder / "silent").touch()
    end_of_silence = time.monotonic() + 1
    while time.monotonic() < end_of_silence:
        assert job.poll() is None
    (cluster.folder / "silent").unlink()
    assert end(job) == 1


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ((), 1),
        (("--gres=gpu:8",), 8),
        (("--gres", "gpu:a100:4"), 4),
        (("--gpus-per-node=2",), 2),
        (("-G", "3", "-p", "gpu"), 3),
        (("--cpus-per-task=16", "--partition=gpu2"), 1),
    ],
)
def test_a_rank_for_each_gpu_that_is_asked_for(
    cluster: Batch, tmp_path: Path, options: tuple[str, ...], ranks: int
) -> None:
    (cluster.folder / "hold").touch()
    submit(tmp_path, *options, ranks=None)
    assert f"#SBATCH --ntasks-per-node={ranks}\n" in (cluster.folder / "script").read_text()


def test_what_sbatch_says_is_told(cluster: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="sbatch refused the job: sbatch: error: invalid partition"):
        submit(tmp_path, "--partition=closed")
    monkeypatch.setenv("PATH", shlex.quote(str(tmp_path)))
    with pytest.raises(UserError, match="needs sbatch and squeue and scancel"):
        submit(tmp_path)
    assert cluster.folder.is_dir()
