"""``experiment run --slurm`` without a cluster: which runs become tasks of an array, and what follows them."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.experiments.config import load_experiment
from megatron_ext.launch.slurm import config_file, jobs_of
from tests.cli.conftest import CommandLine, leave_traces, queued

VARIANTS: dict[str, Any] = {"a": {}, "b": {"optimizer": {"eps": 1e-6}}, "c": {"optimizer": {"eps": 1e-7}}}


@pytest.fixture
def study(config: Path, tmp_path: Path) -> Path:
    return write(config, tmp_path, VARIANTS)


def write(config: Path, folder: Path, variants: dict[str, Any]) -> Path:
    path = folder / "study.json"
    content = {"name": "study", "base": config.name, "output_dir": str(folder / "out"), "seeds": [1]}
    path.write_text(json.dumps(content | {"variants": variants}))
    return path


def test_the_runs_that_are_left_become_an_array_and_a_report_follows(
    study: Path, command_line: CommandLine, programs: Path
) -> None:
    runs = load_experiment(study).runs
    leave_traces(runs[1].config, step=40)
    out = command_line("experiment", "run", study, "--slurm", "--limit", "2", "--partition", "gpu").out
    assert "submitted array 1: 2 runs" in out
    script = (programs / "script.1").read_text()
    for line in ("#SBATCH --array=0,1%2", "#SBATCH --partition=gpu", "#SBATCH --job-name=study", "    [1]="):
        assert line in script
    assert "attempts=2" in script
    for run, jobs in zip(runs, (["1_0"], [], ["1_1"]), strict=True):
        assert [job.job for job in jobs_of(run.config.run_dir)] == jobs
        assert config_file(run.config.run_dir).exists() == bool(jobs)
    report = (programs / "script.2").read_text()
    assert "#SBATCH --dependency=afterany:1" in report
    assert "#SBATCH --partition=gpu" in report
    assert f"-m megatron_ext experiment report {study}" in report
    queued(programs, ("1_0", "PENDING"), ("1_1", "RUNNING"))
    out = command_line("experiment", "status", study, "--json").out
    found = {item["variant"]: (item["state"], item["job"], item["job_state"]) for item in json.loads(out)}
    assert found == {
        "a": ("queued", "1_0", "PENDING"),
        "b": ("finished", None, None),
        "c": ("running", "1_1", "RUNNING"),
    }
    out = command_line("experiment", "status", study).out
    assert "1_0 PENDING (Priority)" in out
    assert "1 queued, 1 running, 1 finished" in out


def test_a_variant_that_is_added_later_is_the_only_one_to_be_submitted(
    study: Path, command_line: CommandLine, programs: Path, config: Path, tmp_path: Path
) -> None:
    command_line("experiment", "run", study, "--slurm")
    queued(programs, ("1_0", "RUNNING"), ("1_1", "PENDING"), ("1_2", "PENDING"))
    out = command_line("experiment", "run", study, "--slurm").out
    assert out == "every run is finished or has a job in the queue\n"
    write(config, tmp_path, VARIANTS | {"late": {"optimizer": {"eps": 1e-5}}})
    assert "submitted array 3: 1 runs" in command_line("experiment", "run", study, "--slurm").out
    assert "late-seed1" in (programs / "script.3").read_text()
    assert "a-seed1" not in (programs / "script.3").read_text()


def test_a_dry_run_and_a_run_that_cannot_be_trained_submit_nothing(
    study: Path, command_line: CommandLine, programs: Path, tmp_path: Path
) -> None:
    out = command_line("experiment", "run", study, "--slurm", "--dry-run").out
    assert "3 runs, 120 steps" in out
    assert "#SBATCH --array=0,1,2" in out
    err = command_line("experiment", "run", study, "--slurm", "--nodes", "3", code=2).err
    assert "a-seed1: a batch of 8 sequences does not divide evenly over 3" in err
    assert not (programs / "sbatch.arguments").exists()
    assert not (tmp_path / "out").exists()
