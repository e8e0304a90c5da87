"""Builds for the tests: one ninja file a build, in a folder of the checkout named by a hash of all that goes into it.

A finished build is used again by later sessions; a build in progress is waited for, under a lock that the system drops
with its owner.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import ninja
import pybind11

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc"
BUILDS = ROOT / "build" / "kernel-tests"
JOBS = 2


class CannotBuildError(Exception):
    """A tool is missing: what is to be built cannot be had on this machine."""


@dataclass(frozen=True)
class Step:
    """One command of a build: ``command`` with ``$in`` and ``$out`` as ninja has them."""

    command: str
    inputs: tuple[Path, ...]
    output: str


@dataclass(frozen=True)
class Build:
    """Steps; files whose content matters to them without being inputs (headers); ``texts``: files to write first."""

    name: str
    steps: tuple[Step, ...]
    depends_on: tuple[Path, ...] = ()
    texts: dict[str, str] = field(default_factory=dict)
    toolchain: str = ""


@cache
def tool(name: str) -> Path:
    """Where a program is; raises ``CannotBuildError`` where it is not."""
    found = shutil.which(name)
    if found is None:
        raise CannotBuildError(f"{name} is not on PATH")
    return Path(found)


@cache
def version_of(name: str) -> str:
    """What a compiler says of itself."""
    return subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True).stdout


def python_flags() -> str:
    """Include paths of a pybind11 module."""
    return f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"


def headers(root: Path) -> tuple[Path, ...]:
    """Every header below ``root``."""
    return tuple(sorted(path for suffix in ("*.h", "*.cuh") for path in root.rglob(suffix)))


def folder_of(build: Build) -> Path:
    """The folder of a build: its name and a hash of commands, contents and toolchain."""
    digest = hashlib.sha256(f"{build.toolchain}{sys.version}{sorted(build.texts.items())}".encode())
    for step in build.steps:
        digest.update(f"{step.command}{[path.name for path in step.inputs]}{step.output}".encode())
    for path in sorted(
        {path for step in build.steps for path in step.inputs if path.is_absolute()} | {*build.depends_on}
    ):
        digest.update(path.name.encode() + path.read_bytes())
    return BUILDS / f"{build.name}-{digest.hexdigest()[:16]}"


def make(build: Build) -> Path:
    """Builds what is not built yet; returns the folder of the outputs. Raises ``AssertionError`` with what failed."""
    folder = folder_of(build)
    with locked(folder) as finished:
        if finished():
            return folder
        _forget_others(folder)
        for name, text in build.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "build.ninja").write_text(_ninja_file(build.steps), encoding="utf-8")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", str(JOBS)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
        (folder / ".finished").touch()
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[Callable[[], bool]]:
    """Holds a build's folder alone; yields the question whether it is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield (folder / ".finished").exists


def _forget_others(folder: Path) -> None:
    """Removes older builds of this name beyond the four newest: a changed source leaves one behind each time."""
    name = folder.name.rsplit("-", 1)[0]
    others = [path for path in BUILDS.glob(f"{name}-*") if path != folder and path.name.rsplit("-", 1)[0] == name]
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[:-4]:
        shutil.rmtree(old, ignore_errors=True)


def _ninja_file(steps: Sequence[Step]) -> str:
    lines = []
    for number, step in enumerate(steps):
        inputs = " ".join(str(path).replace(" ", "$ ").replace(":", "$:") for path in step.inputs)
        lines += [f"rule r{number}", f"  command = {step.command}", f"build {step.output}: r{number} {inputs}"]
    return "\n".join(lines) + "\n"
