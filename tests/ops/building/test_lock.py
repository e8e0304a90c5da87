"""The lock is held by one at a time, and whoever is gone keeps nobody waiting."""

import json
import multiprocessing
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from megatron_ext.ops.building.lock import Owner, Patience, build_lock, read_owner

IMPATIENT = Patience(silence=0.5, total=30.0, poll=0.01)
NEVER_STALE = Patience(silence=1000.0, total=1000.0, poll=0.01)


def write(path: Path, owner: Owner) -> None:
    path.write_text(json.dumps(vars(owner)), encoding="utf-8")


def acquired(path: Path, patience: Patience) -> float:
    """Seconds until the lock was this process's."""
    start = time.monotonic()
    with build_lock(path, lambda: False, patience) as ours:
        assert ours
        assert read_owner(path) == Owner.here()
    assert not path.exists()
    return time.monotonic() - start


def test_a_lock_of_a_process_that_has_ended_is_taken_at_once(tmp_path: Path) -> None:
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(0,))
    child.start()
    child.join()
    assert child.pid is not None
    write(tmp_path / "lock", Owner(socket.gethostname(), child.pid, time.time()))
    assert acquired(tmp_path / "lock", NEVER_STALE) < 5


def test_a_reused_process_id_is_told_apart_by_its_start(tmp_path: Path) -> None:
    write(tmp_path / "lock", Owner(socket.gethostname(), os.getpid(), psutil.Process().create_time() - 500))
    assert acquired(tmp_path / "lock", NEVER_STALE) < 5


@pytest.mark.parametrize("content", ["", "{", '{"host": "elsewhere", "pid": 1, "started": 0.0}'])
def test_a_lock_that_nobody_touches_is_taken_after_the_silence(tmp_path: Path, content: str) -> None:
    (tmp_path / "lock").write_text(content, encoding="utf-8")
    assert 0.5 <= acquired(tmp_path / "lock", IMPATIENT) < 5


def test_a_lock_that_is_touched_is_waited_for_but_not_for_ever(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with build_lock(lock, lambda: False, IMPATIENT):
        # This process lives and touches it: another thread of it must wait for the total.
        waited = Patience(silence=0.5, total=1.5, poll=0.01)
        start = time.monotonic()
        with build_lock(lock, lambda: False, waited) as ours:
            assert ours
        assert time.monotonic() - start >= 1.5


def test_waiting_ends_when_the_work_is_done(tmp_path: Path) -> None:
    write(tmp_path / "lock", Owner("elsewhere", 1, 0.0))
    deadline = time.monotonic() + 0.2
    with build_lock(tmp_path / "lock", lambda: time.monotonic() > deadline, NEVER_STALE) as ours:
        assert not ours
    assert read_owner(tmp_path / "lock") == Owner("elsewhere", 1, 0.0)


def _count(lock: str, counter: str) -> None:
    for _ in range(20):
        with build_lock(Path(lock), lambda: False, NEVER_STALE) as ours:
            assert ours
            value = int(Path(counter).read_text(encoding="utf-8"))
            time.sleep(0.001)
            Path(counter).write_text(str(value + 1), encoding="utf-8")


def test_one_process_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "counter").write_text("0", encoding="utf-8")
    context = multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "lock"), str(tmp_path / "counter"))
    children = [context.Process(target=_count, args=arguments) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert (tmp_path / "counter").read_text(encoding="utf-8") == "60"
