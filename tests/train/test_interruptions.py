"""Runs that are killed or asked to stop, as real processes through the deepspeed launcher."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.train.small_run import (
    cli,
    corpus_data,
    rank_processes,
    records,
    started,
    train_records,
    wait_for_step,
    write_config,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Run directory of the run that is never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = cli("train", str(config_in(folder, corpus)), "--nproc", "2")
    assert done.returncode == 0, done.stderr
    return folder / "small"


def config_in(folder: Path, corpus: Path) -> Path:
    return write_config(folder, data=corpus_data(corpus))


def test_undisturbed_run_leaves_what_it_should(undisturbed: Path) -> None:
    lines = records(undisturbed)
    trained = [line for line in lines if line["kind"] == "train"]
    assert [line["step"] for line in trained] == list(range(1, 41))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [20, 40]
    assert [line["name"] for line in lines if line["kind"] == "event"] == ["start"] + ["checkpoint"] * 4
    assert (undisturbed / "checkpoints" / "latest").read_text() == "step_40\n"
    kept = sorted(path.name for path in (undisturbed / "checkpoints").iterdir() if path.is_dir())
    assert kept == ["step_30", "step_40"]
    assert trained[-1]["loss"] < 0.7 * trained[0]["loss"]
    assert {"config.json", "plan.json", "log.txt", "tensorboard"} <= {path.name for path in undisturbed.iterdir()}


def test_killed_run_goes_on_as_if_nothing_happened(tmp_path: Path, corpus: Path, undisturbed: Path) -> None:
    config, run = config_in(tmp_path, corpus), tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        wait_for_step(run, 14, process)
        for pid in rank_processes(run):
            os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert process.returncode != 0
    killed_at = train_records(run)[-1]["step"]
    assert 14 <= killed_at < 30, "the kill was meant to hit the middle of the length warmup"
    again = cli("train", str(config), "--nproc", "2")
    assert again.returncode == 0, again.stderr
    assert train_records(run) == train_records(undisturbed)
    resumed = [line for line in records(run) if line["kind"] == "event" and line["name"] == "resume"]
    assert len(resumed) == 1
    assert resumed[0]["step"] in {10, 20}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(
    tmp_path: Path, corpus: Path, undisturbed: Path, number: signal.Signals
) -> None:
    config, run = config_in(tmp_path, corpus), tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        wait_for_step(run, 12, process)
        process.send_signal(number)
        assert process.wait(timeout=60) == 0
    last = train_records(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last}\n"
    assert [line["step"] for line in records(run) if line.get("name") == "preemption"] == [last]
    assert rank_processes(run) == []
    again = cli("train", str(config), "--nproc", "2")
    assert again.returncode == 0, again.stderr
    assert train_records(run) == train_records(undisturbed)


def test_signal_while_ranks_start_is_a_stop_with_nothing_to_save(tmp_path: Path, corpus: Path) -> None:
    config, run = config_in(tmp_path, corpus), tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        deadline = time.monotonic() + 60
        while not any("LOCAL_RANK=1" in environment(pid) for pid in rank_processes(run)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    assert rank_processes(run) == []
    assert train_records(run) == []


def test_killed_command_stops_its_ranks_with_a_checkpoint(tmp_path: Path, corpus: Path) -> None:
    config, run = config_in(tmp_path, corpus), tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        wait_for_step(run, 3, process)
        process.kill()
        deadline = time.monotonic() + 60
        while rank_processes(run) and time.monotonic() < deadline:
            time.sleep(0.1)
    assert rank_processes(run) == []
    last = train_records(run)[-1]["step"]
    assert (run / "checkpoints" / "latest").read_text() == f"step_{last}\n"


def test_one_dead_rank_ends_the_run(tmp_path: Path, corpus: Path) -> None:
    config, run = config_in(tmp_path, corpus), tmp_path / "small"
    with started("train", str(config), "--nproc", "2") as process:
        wait_for_step(run, 2, process)
        workers = [pid for pid in rank_processes(run) if "LOCAL_RANK=1" in environment(pid)]
        assert len(workers) == 1
        os.kill(workers[0], signal.SIGKILL)
        assert process.wait(timeout=60) != 0
    time.sleep(0.5)
    assert rank_processes(run) == [], "a rank outlived the run"


def environment(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


def test_finished_run_started_again_does_nothing(undisturbed: Path, corpus: Path) -> None:
    before = train_records(undisturbed)
    again = cli("train", str(undisturbed.parent / "run.json"), "--nproc", "2")
    assert again.returncode == 0, again.stderr
    assert train_records(undisturbed) == before
    assert corpus.exists()
