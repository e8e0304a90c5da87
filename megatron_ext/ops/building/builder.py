"""Libraries from the cache, or built into it: once, whole, and without waiting for anybody who is gone.

Each build has a folder of its own, of which the first to finish is published, so the lock only saves work. It is the
kernel's lock on an open file (run_lock.py): it ends with its holder, however that ends, also over a network. Where a
file system has none, or a holder hangs, a process builds beside the others.
"""

import json
import os
import platform
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from megatron_ext.ops.building.recipe import Backend, Recipe, digest, prebuilt_folder, source_folder
from megatron_ext.ops.building.toolchain import KernelsUnavailableError, cpu_features, find_torch, runs_on
from megatron_ext.runtime.files import publish_directory
from megatron_ext.runtime.run_lock import advisory_lock

_METADATA = "build.json"
_LOG = "build.log"
_PARTIAL = ".partial-"
_PATIENCE_SECONDS = 1800.0
_ABANDONED_SECONDS = 24 * 3600.0


@dataclass(frozen=True)
class Library:
    """A library that can be loaded."""

    backend: Backend
    path: Path
    seconds: float  # how long its build took
    built_now: bool  # whether this call built it; False where it was there
    architectures: tuple[str, ...]  # CUDA architectures it was compiled for, empty of the CPU's


def cached_library(recipe: Recipe, cache: Path) -> Library | None:
    """The library that ``recipe`` would build, where it has been built."""
    return _read(cache / recipe.key, recipe.backend)


def build_library(
    recipe: Recipe, cache: Path, *, jobs: int, force: bool = False, patience_seconds: float = _PATIENCE_SECONDS
) -> Library:
    """The library of ``recipe`` in the folder ``cache``, built where it is not there, with ``jobs`` compilers at once.

    Of several processes that ask at once one builds, and the others take what it built; one that has waited for
    ``patience_seconds`` builds it as well. ``force`` builds also where the result is there, and replaces it. Raises
    KernelsUnavailableError if a compiler failed, now or when the same was tried before, or the cache cannot be written.
    """
    folder, failed = cache / recipe.key, _failure_log(cache, recipe)
    before = _publication(folder) if force else None
    if force:
        failed.unlink(missing_ok=True)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock, what = cache / f"{recipe.key}.lock", f"the {recipe.backend} kernels"
        with advisory_lock(lock, what=what, say_after_seconds=0.0, patience_seconds=patience_seconds):
            library = _read(folder, recipe.backend)
            if library is not None and _publication(folder) != before:
                return library
            if failed.exists():
                # The key has everything that decides: trying again would cost every start a minute.
                raise KernelsUnavailableError(_failure(recipe, failed))
            _remove_abandoned(cache, recipe.key)
            return _build(recipe, folder, jobs=jobs, replace=force)
    except OSError as error:
        raise KernelsUnavailableError(
            f"the cache of kernels {cache} cannot be used ({error}); set MEGATRON_EXT_KERNEL_CACHE to another folder"
        ) from error


def prebuilt_library(backend: Backend, devices: Iterable[tuple[int, int]] = ()) -> Library | None:
    """The library that the installation compiled ahead of time, where it fits sources, torch, CPU and devices."""
    return _first_fitting([prebuilt_folder() / backend], backend, devices)


def fitting_library(backend: Backend, cache: Path, devices: Iterable[tuple[int, int]] = ()) -> Library | None:
    """A library of the cache that fits this machine, whatever compiled it: for machines without a compiler."""
    return _first_fitting(sorted(cache.glob(f"{backend}-*/")), backend, devices)


def _first_fitting(folders: Iterable[Path], backend: Backend, devices: Iterable[tuple[int, int]]) -> Library | None:
    sources, major, features = digest(source_folder(), backend), find_torch().major, cpu_features()
    for folder in folders:
        built = _metadata(folder)
        if built is None or built["sources"] != sources or built["torch_major"] != major:
            continue
        fits_cpu = built["machine"] == platform.machine() and set(built["features"]) <= features
        if fits_cpu and all(runs_on(built["architectures"], device) for device in devices):
            return _read(folder, backend)
    return None


def _build(recipe: Recipe, folder: Path, *, jobs: int, replace: bool) -> Library:
    partial = folder.with_name(f"{folder.name}{_PARTIAL}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    partial.mkdir()
    try:
        start = time.monotonic()
        _run_ninja(recipe, partial, jobs=jobs)
        built = {**recipe.metadata(), "seconds": round(time.monotonic() - start, 1), "host": socket.gethostname()}
        for leftover in (*partial.glob("*.o"), *partial.glob(".ninja*")):
            leftover.unlink()
        (partial / _METADATA).write_text(json.dumps(built, indent=1) + "\n", encoding="utf-8")
        # What another process published meanwhile, without the lock, is as good.
        ours = publish_directory(partial, folder, keep=lambda there: not replace and _metadata(there) is not None)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    library = _read(folder, recipe.backend, built_now=ours)
    assert library is not None, "a library was published without its metadata"
    return library


def _run_ninja(recipe: Recipe, partial: Path, *, jobs: int) -> None:
    (partial / "build.ninja").write_text(recipe.ninja_file(), encoding="utf-8")
    command = [recipe.ninja.path, "-C", str(partial), "-j", str(jobs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    (partial / _LOG).write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode == 0:
        return
    kept = _failure_log(partial.parent, recipe)
    (partial / _LOG).replace(kept)
    raise KernelsUnavailableError(_failure(recipe, kept))


def _failure_log(cache: Path, recipe: Recipe) -> Path:
    """What the compilers said when the recipe failed; is there until it is forced."""
    return cache / f"{recipe.key}.failed.log"


def _failure(recipe: Recipe, log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines()
    first = next((line.strip() for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
    return (
        f"the {recipe.backend} kernels do not compile here: {first[:300]}; see {log}, and try again with "
        f"`megatron-ext kernels build --{recipe.backend} --force`"
    )


def _remove_abandoned(cache: Path, key: str) -> None:
    """Remove what builds of the same key left whose process has ended here, or may have elsewhere: those a day old."""
    here = f"{key}{_PARTIAL}{socket.gethostname()}-"
    for folder in cache.glob(f"{key}{_PARTIAL}*"):
        with suppress(OSError):
            pid = folder.name.removeprefix(here).split("-")[0] if folder.name.startswith(here) else ""
            ended = pid.isdigit() and not psutil.pid_exists(int(pid))
            if ended or time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path, backend: Backend, *, built_now: bool = False) -> Library | None:
    built = _metadata(folder)
    path = folder / f"libmegatron_ext_{backend}.so"
    if built is None or not path.is_file():
        return None
    return Library(backend, path, float(built["seconds"]), built_now, tuple(built["architectures"]))


def _metadata(folder: Path) -> dict[str, Any] | None:
    try:
        built: dict[str, Any] = json.loads((folder / _METADATA).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return built


def _publication(folder: Path) -> tuple[int, int] | None:
    """What tells one publication from the next; None where there is none."""
    try:
        status = (folder / _METADATA).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
