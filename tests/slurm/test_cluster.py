"""Runs as jobs of a real SLURM on hosts in namespaces: trained, stopped, requeued, cancelled, in chains."""

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import LONG, STEPS, Cluster, small_config
from tests.train.small_run import records, train_records

COMMENT = 'it\'s a "$HOME" #x'


def test_a_job_on_two_nodes_trains_to_the_end_as_one_host_does(
    cluster: Cluster, corpus: Path, tmp_path: Path, straight: list[dict[str, Any]]
) -> None:
    run = tmp_path / "small"
    config = small_config(tmp_path, corpus, **LONG)
    [job] = cluster.submit(config, "--gpus-per-node", "1", "--sbatch", f"comment={COMMENT}")
    assert cluster.status(run)["job"] == job
    again = [sys.executable, "-m", "megatron_ext", "submit", str(config)]
    assert f"has job {job} in the queue" in cluster.lab.run(again, env=cluster.environment).stderr
    cluster.wait_for_end(run)
    assert train_records(run) == straight
    told = cluster.status(run)
    assert (told["state"], told["step"], told["restarts"]) == ("finished", STEPS, 0)
    assert {path.name for path in (run / "slurm" / job).glob("*.log")} == {"n1-rank0.log", "n2-rank1.log"}
    assert cluster.slurm("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%k") == COMMENT


def test_a_job_that_is_signaled_before_its_limit_saves_comes_back_and_goes_on(
    cluster: Cluster, corpus: Path, tmp_path: Path, straight: list[dict[str, Any]]
) -> None:
    run = tmp_path / "small"
    [job] = cluster.submit(small_config(tmp_path, corpus, **LONG))
    cluster.wait_for_step(run, 3)
    # What --signal=B:USR1@... sends, at once.
    cluster.slurm("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for_end(run, events=("requeued",))
    cluster.wait_for_end(run)
    assert train_records(run) == straight
    told = cluster.status(run)
    assert (told["state"], told["job"], told["restarts"]) == ("finished", job, 1)
    names = [record["name"] for record in records(run) if record["kind"] == "event"]
    assert names.index("preemption") < names.index("resume")


@pytest.mark.slow
def test_a_job_that_is_preempted_saves_comes_back_and_goes_on(
    cluster: Cluster, corpus: Path, tmp_path: Path, straight: list[dict[str, Any]]
) -> None:
    run = tmp_path / "small"
    cluster.slurm("scontrol", "create", "PartitionName=urgent", "Nodes=n[1-3]", "PriorityTier=10", "PreemptMode=OFF")
    cluster.slurm("scontrol", "update", "PartitionName=main", "GraceTime=30")
    [job] = cluster.submit(small_config(tmp_path, corpus, **LONG))
    cluster.wait_for_step(run, 3)
    # Takes every core of every node.
    cluster.slurm("srun", "--partition=urgent", "--nodes=3", "--ntasks-per-node=2", "true")
    cluster.wait_for_restart(run)
    cluster.wait_for_end(run)
    assert train_records(run) == straight
    assert cluster.status(run)["job"] == job
    names = [record["name"] for record in records(run) if record["kind"] == "event"]
    assert names.index("preemption") < names.index("resume")


def test_a_job_that_is_cancelled_saves_and_does_not_come_back(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "small"
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 100_000}}
    [job] = cluster.submit(small_config(tmp_path, corpus, training=training))
    cluster.wait_for_step(run, 1)
    assert cluster.status(run)["state"] == "running"
    cluster.slurm("scancel", job)
    cluster.wait(lambda: cluster.state(job) == "CANCELLED", "end of the job", run)
    told = cluster.status(run)
    assert told["state"] == "interrupted"
    assert told["checkpoint"] is not None


@pytest.mark.slow
def test_a_chain_goes_on_after_a_link_that_was_stopped_and_ends_with_the_run(
    cluster: Cluster, corpus: Path, tmp_path: Path, straight: list[dict[str, Any]]
) -> None:
    run = tmp_path / "small"
    first, second, third = cluster.submit(small_config(tmp_path, corpus, **LONG), "--chain", "3")
    assert cluster.status(run)["job"] == first
    cluster.wait_for_step(run, 3)
    cluster.slurm("scancel", "--batch", "--signal=USR1", first)
    cluster.wait(lambda: cluster.state(second) == "COMPLETED", "end of the second job", run)
    assert cluster.state(first) == "FAILED"
    assert train_records(run) == straight
    cluster.wait(lambda: cluster.state(third) == "CANCELLED", "end of the third job", run)
    assert cluster.status(run)["state"] == "finished"


@pytest.mark.slow
def test_the_time_limit_of_slurm_stops_a_run_that_then_goes_on(cluster: Cluster, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "small"
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 100_000}}
    config = small_config(tmp_path, corpus, training=training)
    # The last --time counts: a limit of a minute, and the signal half a minute before it.
    [job] = cluster.submit(config, "--time", "1", "--signal-seconds", "20")
    cluster.wait_for_end(run, events=("requeued",))
    cluster.wait_for_restart(run)
    cluster.wait_for_end(run, events=("requeued",))
    names = [record["name"] for record in records(run) if record["kind"] == "event"]
    assert "resume" in names
    cluster.slurm("scancel", job)
    steps = [record["step"] for record in train_records(run)]
    assert steps == list(range(1, len(steps) + 1))
