"""What a run directory remembers of its jobs."""

from pathlib import Path

from megatron_ext.slurm.record import JobRecord, jobs_of, prepare, record_submitted

STARTED = '{"event": "started", "job": "5", "status": null, "restart": 1, "nodes": "n[1-2]", "time": "T"}\n'
ENDED = '{"event": "ended", "job": "5", "status": 1, "restart": 1, "nodes": "n[1-2]", "time": "T"}\n'


def test_every_job_is_known_as_it_was_last_heard_of(tmp_path: Path) -> None:
    assert jobs_of(tmp_path) == []
    prepare(tmp_path, config={"name": "é"}, script="#!/bin/bash\n")
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
    prepare(tmp_path, config={}, script="cd /\udcff\n")
    assert (tmp_path / "slurm" / "job.sh").read_bytes() == b"cd /\xff\n"
