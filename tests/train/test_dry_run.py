"""``train --dry-run`` and ``metrics.profile``: what a step costs, before a run and within one."""

import gzip
import json
from pathlib import Path

import pytest

from tests.train.small_run import cli, records, write_config, write_corpus


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry-run")
    write_corpus(folder)
    return write_config(folder)


def test_two_steps_at_the_longest_length_leave_nothing_behind(config: Path) -> None:
    done = cli("train", str(config), "--dry-run", "--nproc", "2")
    assert done.returncode == 0, done.stderr
    assert "8 sequences of 32 tokens on 2 rank(s), each in 2 micro-batch(es) of up to 2" in done.stderr
    assert "peak memory" in done.stderr
    assert "tokens/s; at this rate the run's" in done.stderr
    assert not (config.parent / "small").exists()


def test_a_trace_of_chosen_steps(config: Path) -> None:
    values = ['metrics.profile={"step": 3, "steps": 2}', 'training.stop_after={"steps": 6}', "name=traced"]
    done = cli("train", str(config), "--nproc", "1", *(word for value in values for word in ("--set", value)))
    assert done.returncode == 0, done.stderr
    run = config.parent / "traced"
    (file,) = (run / "profile").iterdir()
    assert file.name == "step_3_rank_0.json.gz"
    trace = json.loads(gzip.decompress(file.read_bytes()))
    # Two steps, each an optimizer step.
    updates = [event for event in trace["traceEvents"] if event.get("name", "").startswith("Optimizer.step")]
    assert len({event["ts"] for event in updates}) >= 2
    steps = [record for record in records(run) if record["kind"] == "train"]
    assert all(0 < record["peak_memory_bytes"] < 2**40 for record in steps)
