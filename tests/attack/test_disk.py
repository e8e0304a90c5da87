"""Whole runs on disks that fail: every kind of write at a random moment, a small disk that fills up, a killed build."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.faults import build_faults, environment
from tests.train.small_run import cli, corpus_data, records, started, train_records, wait_for_step, write_config

pytestmark = pytest.mark.slow

SEED = int(os.environ.get("ATTACK_SEED", "1"))
ROUNDS = 12


def config_in(folder: Path, corpus: Path, **sections: Any) -> Path:
    data = corpus_data(corpus) | {"index_cache": str(folder / "index")}
    folder.mkdir(parents=True, exist_ok=True)
    return write_config(folder, data=data, **sections)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[dict[str, Any]]:
    """Train records of the run that nothing happens to, on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = worker(config_in(folder, corpus))
    assert done.returncode == 0, done.stderr
    return train_records(folder / "small")


def worker(config: Path, variables: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """One rank, without a launcher: the library of faults is in it alone."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_ext.worker", str(config)],
        env=variables or dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )


@pytest.mark.parametrize("number", range(ROUNDS))
def test_a_run_whose_disk_fails_at_any_call_is_one_message_and_goes_on_later(
    tmp_path: Path, corpus: Path, undisturbed: list[dict[str, Any]], number: int
) -> None:
    chance = random.Random(1000 * SEED + number)
    error = chance.choice([errno.ENOSPC, errno.EIO, errno.EROFS])
    first = chance.choice([chance.randint(1, 60), chance.randint(60, 700)])
    last = chance.choice([first, first + chance.randint(1, 50), 1 << 40])
    config, what = config_in(tmp_path, corpus), f"error {error} from call {first} to {last}"
    faults = environment(build_faults(tmp_path.parent), folder=tmp_path, first=first, last=last, error=error)
    done = worker(config, faults)
    assert "Traceback" not in done.stderr, f"{what}: {done.stderr}"
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode in (0, 1, 2), what
    assert len(said) == (done.returncode != 0), f"{what}: {done.stderr}"
    if done.returncode == 0:
        assert train_records(tmp_path / "small") == undisturbed, what
    elif done.returncode == 1:
        assert "line(s) that could not be written" in said[0] or "forced to disk" in said[0], what
    else:
        assert str(tmp_path) in said[0], f"{what}: the message names no path: {said[0]}"
    again = worker(config)
    assert again.returncode == 0, f"{what}: {again.stderr}"
    if done.returncode != 1:
        assert train_records(tmp_path / "small") == undisturbed, what


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 24 MiB; the run's checkpoints need about 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if os.geteuid() != 0 or mount is None:
        pytest.skip("mounts a file system: needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"cannot mount here: {made.stderr.decode()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all the room that is left; the file that has it."""
    ballast = disk / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return ballast


LONG: dict[str, Any] = {
    "training": {"seq_len": 32, "batch_size": 8, "duration": {"steps": 400}},
    "curriculum": {"pacing": "constant"},
    "checkpoint": {"every": {"steps": 400}, "keep_last": 1},
    "validation": {"every": {"steps": 400}, "samples": 8},
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_for_a_while_costs_nothing(small_disk: Path, corpus: Path, ranks: int) -> None:
    run = small_disk / "small"
    with started("train", str(config_in(small_disk, corpus, **LONG)), "--nproc", str(ranks)) as process:
        wait_for_step(run, 20, process)
        ballast = fill(small_disk)
        before = len(train_records(run))
        time.sleep(3)
        assert process.poll() is None, "the run ended on a full disk although it had nothing to save"
        assert len(train_records(run)) <= before + 16, "the last page of the file has room for a few lines"
        ballast.unlink()
        assert process.wait(timeout=240) == 0
        assert process.stderr is not None
        said = process.stderr.read()
    assert [record["step"] for record in train_records(run)] == list(range(1, 401))
    assert said.count("metrics.jsonl cannot be written (No space left on device)") == 1
    assert "Traceback" not in said


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_stays_full_is_one_message_at_the_checkpoint(small_disk: Path, corpus: Path, ranks: int) -> None:
    run, sections = small_disk / "small", LONG | {"checkpoint": {"every": {"steps": 100}, "keep_last": 1}}
    config = config_in(small_disk, corpus, **sections)
    with started("train", str(config), "--nproc", str(ranks)) as process:
        wait_for_step(run, 120, process)
        ballast = fill(small_disk)
        assert process.wait(timeout=240) == 2
        assert process.stderr is not None
        said = process.stderr.read()
    assert said.count("error: ") == 1
    assert "could not be written to" in said
    assert "Traceback" not in said
    ballast.unlink()
    done = cli("train", str(config), "--nproc", str(ranks))
    assert done.returncode == 0, done.stderr
    assert [record["step"] for record in train_records(run)] == list(range(1, 401))
    assert any(record.get("name") == "resume" and record["step"] >= 100 for record in records(run))


def test_a_start_after_a_killed_build_of_deepspeed_builds_it(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of the build, and a lock that torch alone has left."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    sections = {"parallel": {"micro_batch_tokens": 64, "zero_stage": 2, "offload_optimizer": "cpu"}}
    config = config_in(tmp_path, corpus, **sections)
    lock = tmp_path / "extensions" / "cpu_adam" / "lock"
    command = [sys.executable, "-m", "megatron_ext.worker", str(config)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not lock.exists() and time.monotonic() < deadline:
            assert first.poll() is None
            time.sleep(0.05)
        time.sleep(2)
        first.send_signal(signal.SIGKILL)
    assert lock.exists(), "the kill was meant to hit the build"
    done = worker(config)
    assert done.returncode == 0, done.stderr
    assert f"{lock} was left by a process that has ended" in done.stderr
    lock.touch()
    for path in lock.parent.iterdir():
        then = path.stat().st_mtime - 300  # of some time ago, and in the same order, or ninja would build again
        os.utime(path, (then, then))
    done = worker(config)
    assert done.returncode == 0, done.stderr
    assert f"{lock} was left by a process that has ended" in done.stderr
