"""Probes as SLURM jobs, on programs that do what SLURM's do with processes of this machine."""

import shlex
import sys
import time
from pathlib import Path

import pytest

import megatron_ext.experiments.tune_slurm
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune_slurm import SlurmJob, SlurmRunner

_SBATCH = """#!/bin/bash
here=$(dirname "$0")
echo "$@" > "$here/arguments"
for option in "$@"; do case "$option" in
  --output=*) output="${option#--output=}";;
  --partition=closed) echo "sbatch: error: invalid partition" >&2; exit 1;;
esac; done
cat > "$here/script"
export SLURM_JOB_ID=7
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
case "$*" in *--batch*) kill -TERM "$(cat "$here/pid")";; *) kill -KILL -- "-$(cat "$here/pid")";; esac
"""
_PROGRAM = """
import signal, sys, time
from pathlib import Path
work = Path(sys.argv[1])
def stop(number, frame):
    time.sleep(0.2)
    (work.parent / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
(work.parent / "began").write_text(" ".join(sys.argv[2:]))
if work.read_text() != "wait":
    print("error: no such config")
    sys.exit(2)
time.sleep(60)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", _SBATCH), ("squeue", _SQUEUE), ("scancel", _SCANCEL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    monkeypatch.setattr(megatron_ext.experiments.tune_slurm, "_QUERY_SECONDS", 0.0)
    monkeypatch.setattr(megatron_ext.experiments.tune_slurm, "_GRACE_SECONDS", 0.5)
    return folder


def submit(folder: Path, content: str, *options: str) -> SlurmJob:
    program, config = folder / "program.py", folder / "a probe.json"
    program.write_text(_PROGRAM)
    config.write_text(content)
    runner = SlurmRunner(options, ranks=4, program=(sys.executable, str(program)))
    return runner.start(config, output=folder / "a probe.out")


def end(job: SlurmJob) -> int:
    deadline = time.monotonic() + 30
    while (status := job.poll()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return status


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_job_tells_its_status_and_its_output(cluster: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, "broken", "--partition=gpu", "--comment=two words")
    assert end(job) == 2
    assert "error: no such config" in (tmp_path / "a probe.out").read_text()
    assert (tmp_path / "began").read_text() == "--nproc 4"
    arguments = (cluster / "arguments").read_text()
    assert "--partition=gpu --comment=two words" in arguments
    assert "--dependency=singleton" in arguments
    job.close()
    assert not list(tmp_path.glob("*.status*"))
    assert not (cluster / "cancelled").exists()


def test_a_job_that_is_asked_to_stop_saves_first(cluster: Path, tmp_path: Path) -> None:
    job = submit(tmp_path, "wait")
    wait_for(tmp_path / "began")
    assert job.poll() is None
    assert job.ask_to_stop()
    assert end(job) == 0
    assert (tmp_path / "saved").exists()
    assert (cluster / "cancelled").read_text().split() == ["--batch", "--signal=TERM", "7"]


def test_a_job_that_waits_is_taken_back(cluster: Path, tmp_path: Path) -> None:
    (cluster / "hold").touch()
    job = submit(tmp_path, "wait")
    assert job.poll() is None
    assert job.ask_to_stop()
    assert (cluster / "cancelled").read_text().split() == ["7"]
    assert end(job) == 1


def test_a_job_that_is_gone_without_a_word_has_failed_and_a_silent_controller_says_nothing(
    cluster: Path, tmp_path: Path
) -> None:
    job = submit(tmp_path, "wait")
    wait_for(tmp_path / "began")
    job.close()
    (cluster / "silent").touch()
    end_of_silence = time.monotonic() + 1
    while time.monotonic() < end_of_silence:
        assert job.poll() is None
    (cluster / "silent").unlink()
    assert end(job) == 1
    assert not (tmp_path / "saved").exists()


def test_what_sbatch_says_is_told(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="sbatch refused the job: sbatch: error: invalid partition"):
        submit(tmp_path, "wait", "--partition=closed")
    monkeypatch.setenv("PATH", shlex.quote(str(tmp_path)))
    with pytest.raises(UserError, match="--slurm needs sbatch and squeue and scancel"):
        submit(tmp_path, "wait")
    assert cluster.is_dir()
