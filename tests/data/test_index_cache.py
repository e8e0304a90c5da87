"""The index cache: built once by many, whole or absent, and never held up by the dead."""

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import signal
import threading
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_ext.data import index_cache
from megatron_ext.data.index_cache import Arrays, IndexCache
from megatron_ext.errors import UserError
from megatron_ext.runtime.log import LOGGER

KEY: dict[str, Any] = {"kind": "test", "seed": 1}
SPAWN = multiprocessing.get_context("spawn")


def _arrays() -> Arrays:
    return {"a": np.arange(1000, dtype=np.int64), "b": np.ones((3, 2), dtype=np.int32)}


def _who_builds() -> Arrays:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    return {"process": np.array([os.getpid()]), "blocked": np.array(sorted(blocked))}


def _end_killed() -> Arrays:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def _find_disk_full() -> Arrays:
    raise OSError(errno.ENOSPC, "No space left on device")


def _entries(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.is_dir()]


def _check(arrays: Arrays) -> None:
    for name, expected in _arrays().items():
        np.testing.assert_array_equal(arrays[name], expected)
        assert arrays[name].dtype == expected.dtype


def _build_slowly(directory: Path, log: Path, start: Barrier) -> None:
    def build() -> Arrays:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return _arrays()

    start.wait(60)
    _check(IndexCache(directory).get(KEY, build))


def _build_for_ever(directory: Path, building: Path) -> None:
    def build() -> Arrays:
        building.touch()
        time.sleep(600)
        return {}

    IndexCache(directory).get(KEY, build)


def _stuck_builder(tmp_path: Path) -> Any:
    building = tmp_path / "building"
    process = SPAWN.Process(target=_build_for_ever, args=(tmp_path / "cache", building), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not building.exists():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return process


def test_built_once_then_loaded(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path / "deep" / "cache")
    _check(cache.get(KEY, _arrays))

    def never() -> Arrays:
        raise AssertionError("built twice")

    arrays = cache.get(dict(reversed(KEY.items())), never)
    _check(arrays)
    assert not arrays["a"].flags.writeable
    assert len(_entries(tmp_path / "deep" / "cache")) == 1


def test_other_key_other_entry(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    cache.get(KEY, _arrays)
    other = cache.get({**KEY, "seed": 2}, lambda: {"a": np.zeros(2)})
    assert other["a"].tolist() == [0.0, 0.0]
    names = {path.name for path in _entries(tmp_path)}
    # Keys and layout of files are a promise: indexes that are there must be found by later versions.
    assert names == {"2732d83cc2ed39cc8f67c0b12b075bcd", "dd3243c517b1f25897a16233ed00267b"}
    entry = tmp_path / "2732d83cc2ed39cc8f67c0b12b075bcd"
    assert {path.name for path in entry.iterdir()} == {"a.npy", "b.npy", "manifest.json"}
    manifest = json.loads((entry / "manifest.json").read_text())
    assert {name: manifest[name] for name in ("key", "bytes")} == {"key": KEY, "bytes": {"a": 8128, "b": 152}}
    assert manifest["checksums"].keys() == {"a", "b"}


def test_processes_that_start_at_once_build_one_entry(tmp_path: Path) -> None:
    log, start = tmp_path / "log", SPAWN.Barrier(3)
    processes = [SPAWN.Process(target=_build_slowly, args=(tmp_path / "cache", log, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text().splitlines()) == 1
    assert len(_entries(tmp_path / "cache")) == 1


def test_a_builder_is_waited_for_until_it_is_killed_or_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(index_cache, "_SAY_AFTER_SECONDS", 0.1)
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level("INFO")
    process = _stuck_builder(tmp_path)
    # A stopped process keeps its lock: others build a copy when their patience ends.
    os.kill(process.pid, signal.SIGSTOP)
    _check(IndexCache(tmp_path / "cache", patience_seconds=0.3).get(KEY, _arrays))
    waits, goes_on = [record.getMessage() for record in caplog.records]
    holder = rf"process {process.pid} on \S+"
    assert re.fullmatch(rf"waiting for the index [0-9a-f]{{32}}, which .* \({holder}; lock .*\)", waits)
    assert re.search(rf"was held for 0 s \({holder}\); going on without it", goes_on)
    # A killed one ends its lock, before others wait or while they do.
    shutil.rmtree(_entries(tmp_path / "cache")[0])
    timer = threading.Timer(0.3, process.kill)
    timer.start()
    began = time.monotonic()
    _check(IndexCache(tmp_path / "cache", patience_seconds=60).get(KEY, _arrays))
    assert time.monotonic() - began < 30
    timer.join()
    process.join(30)


def test_lock_file_names_its_holder(tmp_path: Path) -> None:
    seen: list[str] = []

    def build() -> Arrays:
        seen.extend(path.read_text() for path in tmp_path.glob("*.lock"))
        return _arrays()

    IndexCache(tmp_path).get(KEY, build)
    assert len(seen) == 1
    assert seen[0].split()[1] == str(os.getpid())


def test_without_file_locks_the_second_copy_is_thrown_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    both, cache, results = threading.Barrier(2), IndexCache(tmp_path), []

    def build() -> Arrays:
        both.wait(30)
        return _arrays()

    threads = [threading.Thread(target=lambda: results.append(cache.get(KEY, build))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    for arrays in results:
        _check(arrays)
    assert len(_entries(tmp_path)) == 1


@pytest.mark.parametrize(
    ("file", "size"), [("a.npy", None), ("a.npy", 500), ("a.npy", 0), ("manifest.json", None), ("manifest.json", 0)]
)
def test_damaged_entry_is_built_again(tmp_path: Path, file: str, size: int | None) -> None:
    cache = IndexCache(tmp_path)
    cache.get(KEY, _arrays)
    (entry,) = _entries(tmp_path)
    path = entry / file
    if size is None:
        path.unlink()
    else:
        os.truncate(path, size)
    _check(cache.get(KEY, _arrays))
    _check(cache.get(KEY, dict))
    assert len(list(tmp_path.iterdir())) == 2  # the entry and its lock


def test_old_leftovers_are_removed_and_young_ones_kept(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    cache.get(KEY, _arrays)
    (entry,) = _entries(tmp_path)
    old, young = (tmp_path / f"{entry.name}.partial-host-{n}" for n in (1, 2))
    for path in (old, young):
        path.mkdir()
    long_ago = time.time() - 90_000
    os.utime(old, (long_ago, long_ago))
    (entry / "a.npy").unlink()
    _check(cache.get(KEY, _arrays))
    assert young.exists()
    assert not old.exists()


def test_failed_build_leaves_nothing_and_may_be_tried_again(tmp_path: Path) -> None:
    def fail() -> Arrays:
        raise RuntimeError("no luck")

    cache = IndexCache(tmp_path)
    with pytest.raises(RuntimeError, match="no luck"):
        cache.get(KEY, fail)
    assert _entries(tmp_path) == []
    _check(cache.get(KEY, _arrays))


def test_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"index cache .*file/cache: cannot be written.*data\.index_cache"):
        IndexCache(tmp_path / "file" / "cache").get(KEY, _arrays)


def test_large_entry_is_built_by_another_process_that_signals_do_not_stop(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    arrays = cache.get(KEY, _who_builds, elements=index_cache._LARGE)
    assert arrays["process"][0] != os.getpid()
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= set(arrays["blocked"].tolist())
    small = cache.get(KEY | {"seed": 2}, _who_builds, elements=index_cache._LARGE - 1)
    assert small["process"][0] == os.getpid()
    assert signal.SIGTERM not in small["blocked"].tolist()


def test_large_entry_whose_builder_fails(tmp_path: Path) -> None:
    cache = IndexCache(tmp_path)
    with pytest.raises(UserError, match=r"index cache .*: the process that built an entry was killed; .* memory"):
        cache.get(KEY, _end_killed, elements=index_cache._LARGE)
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\)"):
        cache.get(KEY, _find_disk_full, elements=index_cache._LARGE)
    assert _entries(tmp_path) == []
