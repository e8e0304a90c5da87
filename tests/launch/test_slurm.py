"""SLURM's programs as functions, on programs that answer as they do; what a run directory remembers of its jobs."""

from pathlib import Path

import pytest

from megatron_ext.errors import UserError
from megatron_ext.launch import slurm
from megatron_ext.launch.slurm import JobRecord, QueuedJob, jobs_of, prepare, record_submitted

STARTED = '{"event": "started", "job": "5", "status": null, "restart": 1, "nodes": "n[1-2]", "time": "T"}\n'
ENDED = '{"event": "ended", "job": "5", "status": 1, "restart": 1, "nodes": "n[1-2]", "time": "T"}\n'
_SQUEUE = """#!/bin/bash
here=$(dirname "$0")
printf '%s\\n' "$@" > "$here/squeue.arguments"
cat "$here/answer"
cat "$here/error" >&2
[ ! -s "$here/error" ]
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in (("squeue", _SQUEUE), ("sbatch", "#!/bin/bash\ncat >&2\nexit 1\n"), ("scancel", "#!/bin/bash\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "answer").touch()
    (tmp_path / "error").touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return tmp_path


def test_the_queue_is_asked_once_for_all_jobs(programs: Path) -> None:
    lines = [("4_1", "PENDING", "Priority", "", "N/A", "1:00"), ("7", "RUNNING", "None", "n[1-2]", "T", "0:59")]
    (programs / "answer").write_text("".join("\x1f".join(line) + "\n" for line in lines))
    assert slurm.queue(["4_1", "7", "9", "7"]) == {
        "4_1": QueuedJob("4_1", "PENDING", "Priority", "", "N/A", "1:00"),
        "7": QueuedJob("7", "RUNNING", "None", "n[1-2]", "T", "0:59"),
        "9": QueuedJob("9", "COMPLETED"),
    }
    assert "--jobs=4_1,7,9" in (programs / "squeue.arguments").read_text()
    assert slurm.queue([]) == {}


def test_jobs_that_the_controller_forgot_are_over_and_a_silent_one_says_nothing(programs: Path) -> None:
    (programs / "error").write_text("slurm_load_jobs error: Invalid job id specified\n")
    assert slurm.queue(["7"])["7"].is_over
    (programs / "error").write_text("slurm_load_jobs error: Unable to contact slurm controller\n")
    assert slurm.queue(["7"])["7"] == QueuedJob("7", slurm.UNKNOWN)
    assert not slurm.queue(["7"])["7"].is_over


def test_what_sbatch_says_is_told_and_a_missing_program_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"sbatch refused the job: a script\. Do this"):
        slurm.submit("a script", remedy="Do this")
    assert slurm.has_slurm()
    monkeypatch.setenv("PATH", str(programs / "nowhere"))
    assert not slurm.has_slurm()
    with pytest.raises(UserError, match="submit needs sbatch and squeue and scancel, not on PATH"):
        slurm.require_slurm("submit")
    assert not slurm.cancel("7")


def test_every_job_is_known_as_it_was_last_heard_of(tmp_path: Path) -> None:
    assert jobs_of(tmp_path) == []
    prepare(tmp_path, config='{"name": "é"}', script="#!/bin/bash\n")
    record_submitted(tmp_path, "5")
    record_submitted(tmp_path, "6")
    assert [(job.job, job.event) for job in jobs_of(tmp_path)] == [("5", "submitted"), ("6", "submitted")]
    with (tmp_path / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(STARTED)
    assert jobs_of(tmp_path)[0] == JobRecord("5", "started", None, 1, "n[1-2]", "T")
    with (tmp_path / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(ENDED)
    assert jobs_of(tmp_path)[0].failed


def test_a_job_may_begin_before_it_is_noted_that_it_was_submitted(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.jsonl").write_text(STARTED)
    record_submitted(tmp_path, "5")
    assert [job.event for job in jobs_of(tmp_path)] == ["started"]


def test_lines_that_are_being_written_or_are_damaged_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "slurm" / "jobs.jsonl").write_text(STARTED + "[1]\n" + '{"event": "ended"}\n' + ENDED[:30])
    assert [job.event for job in jobs_of(tmp_path)] == ["started"]


def test_a_stop_on_request_is_no_failure() -> None:
    assert not JobRecord("5", "ended", 75).failed
    assert not JobRecord("5", "ended", 0).failed
    assert not JobRecord("5", "failed", 1).failed, "another attempt follows"
    assert JobRecord("5", "ended", 75).may_be_queued, "SLURM may start it again"
    assert not JobRecord("5", "ended", 0).may_be_queued


def test_a_path_that_is_no_text_gets_into_the_script_as_it_is(tmp_path: Path) -> None:
    prepare(tmp_path, config="{}", script="cd /\udcff\n")
    assert (tmp_path / "slurm" / "job.sh").read_bytes() == b"cd /\xff\n"
