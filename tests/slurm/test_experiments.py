"""An experiment as an array of jobs on a real SLURM: one that fails, one that is hurt once, one that is added later."""

import json
import sys
from pathlib import Path
from typing import Any

from megatron_ext.launch.slurm import jobs_of
from tests.slurm.conftest import Cluster, small_config
from tests.train.small_run import records, train_records

STEPS = 120
VARIANTS: dict[str, Any] = {
    "hurt": {"optimizer": {"eps": 1e-7}},
    # A loss above the lowest one so far ends the run; so it does soon after its newest checkpoint.
    "failing": {"guards": {"loss_ratio": {"above": 1.0001, "steps": 1, "action": "stop"}}},
    # The last task, whose job has the number of the array.
    "good": {},
}


def write_experiment(folder: Path, corpus: Path, variants: dict[str, Any]) -> Path:
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": STEPS}}
    small_config(folder, corpus, training=training, checkpoint={"every": {"steps": 30}, "keep_last": 2})
    content = {"name": "array", "base": "run.json", "output_dir": str(folder / "out"), "seeds": [1]}
    path = folder / "array.json"
    path.write_text(json.dumps(content | {"variants": variants}))
    return path


def kill_rank(cluster: Cluster, run: Path) -> None:
    """Kill the rank of a run of one rank, on whichever node it is."""
    config = str(run / "slurm" / "config.json")
    for host in cluster.lab.hosts:
        for line in cluster.lab.processes(host, word=config):
            _, pid, program = line.split(maxsplit=2)
            if program.startswith(sys.executable):
                cluster.lab.run(["kill", "-KILL", pid], host=host)
                return
    raise AssertionError(f"no rank of {run}")


def test_an_array_trains_the_variants_retries_once_marks_and_reports(
    cluster: Cluster, corpus: Path, tmp_path: Path
) -> None:
    file = write_experiment(tmp_path, corpus, VARIANTS)
    output = cluster.cli("experiment", "run", str(file), "--slurm", "--time", "10", "--limit", "2")
    array = output.split()[2].rstrip(":")
    runs = {name: tmp_path / "out" / f"{name}-seed1" for name in VARIANTS}
    found = json.loads(cluster.cli("experiment", "status", str(file), "--json"))
    assert [item["job"] for item in found] == [f"{array}_{task}" for task in range(3)]
    assert {item["state"] for item in found} <= {"queued", "running"}
    assert "every run is finished or has a job" in cluster.cli("experiment", "run", str(file), "--slurm")
    cluster.wait_for_step(runs["hurt"], 35)
    kill_rank(cluster, runs["hurt"])
    cluster.wait_for_step(runs["good"], 3)
    cluster.slurm("scancel", "--batch", "--signal=USR1", f"{array}_2")
    cluster.wait_for_end(runs["good"], events=("requeued",))
    watched = cluster.lab.start(
        [sys.executable, "-m", "megatron_ext", "experiment", "status", str(file), "--watch", "--every", "1"],
        env=cluster.environment,
    )
    for run in runs.values():
        cluster.wait_for_end(run)
    watched.wait(30)
    found = json.loads(cluster.cli("experiment", "status", str(file), "--json"))
    assert {item["variant"]: item["state"] for item in found} == {
        "hurt": "finished",
        "good": "finished",
        "failing": "failed",
    }
    assert "exit status 1" in found[1]["note"]
    for name, failures, restarts in (("hurt", 1, 0), ("failing", 1, 0), ("good", 0, 1)):
        text = (runs[name] / "slurm" / "jobs.jsonl").read_text()
        assert text.count('"event": "failed"') == failures, "one further attempt"
        assert jobs_of(runs[name])[-1].restart == restarts, "a task that is requeued leaves the others alone"
        events = [record["name"] for record in records(runs[name]) if record["kind"] == "event"]
        assert events.count("start") == 1
        assert events.count("resume") == 1, "from the checkpoint"
    for name in ("hurt", "good"):
        assert [record["step"] for record in train_records(runs[name])] == list(range(1, STEPS + 1))
    page = tmp_path / "out" / "report.html"
    cluster.wait(page.exists, "report", runs["good"])
    more = {"hurt": VARIANTS["hurt"], "good": {}, "late": {"optimizer": {"eps": 1e-6}}}
    file = write_experiment(tmp_path, corpus, more)
    script = cluster.cli("experiment", "run", str(file), "--slurm", "--dry-run")
    assert "#SBATCH --array=0\n" in script
    assert f"[0]={tmp_path}/out/late-seed1" in script
    assert str(runs["good"]) not in script.partition("#!/bin/bash")[2]
    assert not jobs_of(tmp_path / "out" / "late-seed1")
