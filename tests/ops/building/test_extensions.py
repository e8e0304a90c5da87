"""Builds of torch's extensions: nobody waits for the dead, and everybody for the living."""

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from megatron_ext.errors import UserError
from megatron_ext.ops.building import extensions
from megatron_ext.ops.building.extensions import BuildLock, own_build_locks

BUILDER = """
import sys, time
from pathlib import Path
from megatron_ext.ops.building.extensions import BuildLock
lock = BuildLock(sys.argv[1])
print("builds" if lock.try_acquire() else "has", flush=True)
time.sleep(float(sys.argv[2]))
if len(sys.argv) > 3:
    Path(sys.argv[3]).touch()
lock.release()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    return folder


def builder(folder: Path, seconds: float, *library: str) -> "subprocess.Popen[str]":
    arguments = [str(folder / "lock"), str(seconds), *library]
    process = subprocess.Popen([sys.executable, "-c", BUILDER, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "builds\n"
    return process


def acquire(folder: Path, *, within: float) -> bool:
    """Take the lock and give it back; whether it was ours to build."""
    lock, answers = BuildLock(str(folder / "lock")), list[bool]()
    thread = threading.Thread(target=lambda: answers.append(lock.try_acquire()), daemon=True)
    thread.start()
    thread.join(within)
    assert answers, f"still waiting after {within} s"
    if answers[0]:
        assert (folder / "lock").exists(), "programs that know torch's lock alone have to see it"
        lock.release()
        assert not (folder / "lock").exists()
    else:
        lock.wait()
    return answers[0]


def test_a_free_folder_is_ours_and_stays_usable(folder: Path) -> None:
    assert acquire(folder, within=10)
    assert acquire(folder, within=10)


def test_an_old_lock_without_a_builder_is_taken_over(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "lock").touch()
    for path in (folder / "lock", folder):
        os.utime(path, (1, 1))
    with caplog.at_level("INFO"):
        assert acquire(folder, within=10)
    assert any("was left by a process that has ended" in message for message in caplog.messages)
    assert any("building the extension cpu_adam" in message for message in caplog.messages)


def test_a_young_lock_of_another_program_is_waited_for_and_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(extensions, "_STRANGERS_SECONDS", 2.0)
    (folder / "lock").touch()
    start = time.monotonic()
    assert acquire(folder, within=20)
    assert time.monotonic() - start > 1
    assert (
        sum("waiting for the extension cpu_adam, which nobody builds on this host" in m for m in caplog.messages) == 1
    )


@pytest.mark.parametrize("torchs", [True, False])
def test_a_living_builder_of_another_program_is_waited_for(
    folder: Path, torchs: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """``torchs``: it has the lock open, as torch does; else it is a compiler whose starter was killed."""
    (folder / "lock").touch()
    os.utime(folder / "lock", (1, 1))
    program = folder.parent / "ninja"
    program.symlink_to(sys.executable)
    code = "import sys, time; kept = open(sys.argv[1]) if sys.argv[1] else None; print(flush=True); time.sleep(3)"
    process = subprocess.Popen(
        [sys.executable if torchs else str(program), "-c", code, str(folder / "lock") if torchs else ""],
        cwd="/" if torchs else folder,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    start = time.monotonic()
    assert acquire(folder, within=30)
    assert time.monotonic() - start > 1
    assert f"which process {process.pid} builds" in caplog.text
    process.wait()


def test_a_killed_builder_of_ours_holds_up_nobody(folder: Path) -> None:
    process = builder(folder, 600)
    process.kill()
    process.communicate()
    assert (folder / "lock").exists()
    assert acquire(folder, within=10)


def test_what_another_has_built_meanwhile_is_not_built_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    process = builder(folder, 3, str(folder / "cpu_adam.so"))
    with caplog.at_level("INFO"):
        assert not acquire(folder, within=30)
    process.communicate()
    assert f"waiting for the extension cpu_adam, which another process makes (process {process.pid}" in caplog.text
    assert acquire(folder, within=10), "the one that waited has let go"


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_disk_is_one_message(monkeypatch: pytest.MonkeyPatch, wrapped: bool) -> None:
    monkeypatch.setattr(torch.utils.cpp_extension, "FileBaton", FileBaton)
    full = OSError(errno.ENOSPC, "No space left on device", "/cache/cpu_adam/lock")
    error: Exception = full
    if wrapped:
        error = RuntimeError("the op failed to build")
        error.__cause__ = full
    with pytest.raises(UserError, match=r"cpu_adam/lock: No space left .*TORCH_EXTENSIONS_DIR"), own_build_locks():
        raise error
    with pytest.raises(RuntimeError, match="no compiler"), own_build_locks():
        raise RuntimeError("no compiler")
    assert vars(torch.utils.cpp_extension)["FileBaton"] is BuildLock
