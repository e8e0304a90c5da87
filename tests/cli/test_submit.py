"""``submit`` and ``status`` without a cluster: what is found before anything is queued, and what is asked of SLURM."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.slurm_options import SlurmOptions
from megatron_ext.config.loading import load_config
from megatron_ext.launch.slurm import jobs_of, live_jobs
from megatron_ext.runtime.run_lock import run_lock
from tests.cli.conftest import CommandLine, leave_traces, queued


def test_a_dry_run_prints_the_script_and_makes_nothing(config: Path, command_line: CommandLine) -> None:
    options = ("--nodes", "2", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1:00:00", "--account", "a b")
    out, err = command_line("submit", config, *options, "--dry-run")
    assert err == ""
    lines = out.splitlines()
    for line in ("nodes=2", "ntasks-per-node=4", "gpus-per-node=4", "partition=gpu", 'account="a b"'):
        assert f"#SBATCH --{line}" in lines
    assert f"    [0]={config.parent}/small" in lines
    assert sum(line.lstrip().startswith("srun ") for line in lines) == 1
    assert "batch_size" not in out, "no hyper-parameters"
    assert not (config.parent / "small").exists()


def test_a_dry_run_needs_no_data(config: Path, command_line: CommandLine) -> None:
    out, err = command_line("submit", config, "--set", "data.tokenizer=nowhere.json", "--dry-run")
    assert out.startswith("#!/bin/bash")
    assert "would be refused" in err
    assert "nowhere.json" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--set", "training.seq_len=60"), "seq_len"),
        (("--set", "data.tokenizer=nowhere.json"), "nowhere.json"),
        (("--set", "parallel.tensor=2"), "parallel.tensor is 2, which does not divide the 1 rank"),
        (("--nodes", "3"), "a batch of 8 sequences does not divide evenly over 3"),
        (("--time", "soon"), "--time is 'soon'"),
        (("--array", "1-3"), "the tasks would train in one directory"),
        (("--array", "1-3", "--set", "name={task}", "--chain", "2"), "use one of the two"),
        (("--sbatch", "wrap=x"), "decides that"),
        (("--container-runtime", "docker"), "'docker' is not one of 'pyxis', 'apptainer'"),
    ],
)
def test_what_is_wrong_is_found_before_anything_is_queued(
    config: Path, command_line: CommandLine, programs: Path, options: tuple[str, ...], message: str
) -> None:
    assert message in command_line("submit", config, *options, code=2).err
    assert not (programs / "sbatch.arguments").exists()
    assert not (config.parent / "small").exists()


def test_a_checkpoint_of_another_layout_is_found_too(config: Path, command_line: CommandLine, programs: Path) -> None:
    leave_traces(load_config(config), step=10)
    assert "world_size is 1 there and 2 here" in command_line("submit", config, "--nodes", "2", code=2).err
    assert not (programs / "sbatch.arguments").exists()


def test_a_job_is_on_record_with_what_it_trains(config: Path, command_line: CommandLine, programs: Path) -> None:
    out = command_line("submit", config, "--set", "seed=7", "--retries", "1").out
    assert "submitted job 1; to end it: scancel 1" in out
    run = config.parent / "small"
    assert [job.job for job in jobs_of(run)] == ["1"]
    assert load_config(run / "slurm" / "config.json") == load_config(config, ["seed=7"])
    script = (programs / "script.1").read_text()
    assert script == (run / "slurm" / "job.sh").read_text()
    assert "attempts=2" in script
    queued(programs, ("1", "PENDING"))
    assert live_jobs([run]) == {run: "1"}
    assert "has job 1 in the queue" in command_line("submit", config, code=2).err


def test_an_array_trains_a_run_in_each_task(config: Path, command_line: CommandLine, programs: Path) -> None:
    overrides = ("--set", "name=s-{task}", "--set", "seed={task}")
    assert "submitted array 1" in command_line("submit", config, "--array", "2,5%1", *overrides).out
    for task in (2, 5):
        run = config.parent / f"s-{task}"
        assert [job.job for job in jobs_of(run)] == [f"1_{task}"]
        assert load_config(run / "slurm" / "config.json").seed == task
    assert "#SBATCH --array=2,5%1" in (programs / "script.1").read_text()


def test_each_job_of_a_chain_waits_for_all_before(config: Path, command_line: CommandLine, programs: Path) -> None:
    out = command_line("submit", config, "--chain", "3", "--dependency", "afterok:99").out
    assert "submitted chain of jobs 1 2 3" in out
    first, second, third = (programs / "sbatch.arguments").read_text().splitlines()
    assert "--dependency" not in first
    assert second.endswith("--dependency=afternotok:1 --kill-on-invalid-dep=yes")
    assert third.endswith("--dependency=afternotok:1:2 --kill-on-invalid-dep=yes")
    assert "#SBATCH --dependency=afterok:99" in (programs / "script.1").read_text()
    assert "afterok" not in (programs / "script.2").read_text()
    assert "requeue=0" in (programs / "script.1").read_text()


def test_what_sbatch_refuses_is_told(config: Path, command_line: CommandLine, programs: Path) -> None:
    err = command_line("submit", config, "--sbatch", "comment=refused", code=2).err
    assert "sbatch refused the job: sbatch: error: no" in err
    assert jobs_of(config.parent / "small") == []
    assert programs.is_dir()


def test_the_container_sees_what_the_run_reads_and_writes(config: Path, corpus: Path) -> None:
    run = load_config(config)
    found = SlurmOptions(container="image").job([run]).container
    assert found is not None
    assert set(found.mounts) >= {str(corpus), str(config.parent)}
    assert SlurmOptions().job([run]).container is None
    mounted = SlurmOptions(container="image", container_runtime="apptainer", mounts=["/data"]).job([run]).container
    assert mounted is not None
    assert (mounted.runtime, mounted.mounts) == ("apptainer", ("/data",))


def status_of(command_line: CommandLine, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command_line("status", *arguments, "--json").out)
    return found


def test_status_of_a_run_on_this_machine(config: Path, command_line: CommandLine) -> None:
    run = load_config(config)
    assert status_of(command_line, str(config))["state"] == "waiting"
    leave_traces(run, step=20, loss=2.5)
    found = status_of(command_line, str(config))
    assert (found["state"], found["step"], found["steps"], found["valid_loss"]) == ("interrupted", 20, 40, 2.5)
    assert found["checkpoint"] == "step_20"
    assert found["eta_s"] == pytest.approx((found["total_tokens"] - found["tokens"]) / found["tokens_per_s"])
    with run_lock(run.run_dir):
        assert status_of(command_line, str(config))["state"] == "running"
    leave_traces(run, step=40)
    finished = status_of(command_line, str(config))
    assert (finished["state"], finished["eta_s"]) == ("finished", 0.0)
    out = command_line("status", config).out
    assert "40 of 40" in out
    assert "to the end" not in out


def test_status_of_a_job(config: Path, command_line: CommandLine, programs: Path) -> None:
    command_line("submit", config)
    run = config.parent / "small"
    queued(programs, ("1", "PENDING"))
    found = status_of(command_line, str(run))
    state = [found[name] for name in ("state", "job", "job_state", "job_reason")]
    assert state == ["queued", "1", "PENDING", "Priority"]
    queued(programs, ("1", "RUNNING"))
    assert status_of(command_line, str(run))["state"] == "running"
    assert "1, RUNNING, 9:00 left, on n1" in command_line("status", run).out
    queued(programs)
    found = status_of(command_line, str(run))
    assert (found["state"], found["note"]) == ("failed", "job 1 left the queue without having begun")
    with (run / "slurm" / "jobs.jsonl").open("a") as file:
        file.write(json.dumps({"event": "ended", "job": "1", "status": 1}) + "\n")
    found = status_of(command_line, str(run))
    assert found["state"] == "failed"
    assert "exit status 1" in found["note"]
    # SLURM starts it again by itself.
    queued(programs, ("1", "PENDING"))
    assert status_of(command_line, str(run))["state"] == "queued"
    assert live_jobs([run]) == {run: "1"}


def test_status_of_what_is_no_run(tmp_path: Path, command_line: CommandLine) -> None:
    assert "is no run" in command_line("status", tmp_path / "nowhere", code=2).err
