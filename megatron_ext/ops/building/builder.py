"""Libraries from the cache, or built into it: once, whole, and without waiting for anybody who is gone."""

import json
import os
import platform
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.ops.building.architectures import runs_on
from megatron_ext.ops.building.lock import Owner, Patience, build_lock
from megatron_ext.ops.building.problem import KernelsUnavailableError
from megatron_ext.ops.building.recipe import Recipe
from megatron_ext.ops.building.sources import Backend, digest, prebuilt_folder, source_folder
from megatron_ext.ops.building.toolchain import cpu_features, find_torch
from megatron_ext.runtime.files import replace_text, sync

_FACTS = "build.json"
_LOG = "build.log"
_PARTIAL = ".partial-"


@dataclass(frozen=True)
class Library:
    """A library that can be loaded."""

    backend: Backend
    path: Path
    seconds: float
    """How long its build took."""

    built_now: bool
    """Whether this call built it; False where it was there."""

    architectures: tuple[str, ...]
    """CUDA architectures it was compiled for, empty of the CPU's."""


def cached_library(recipe: Recipe, cache: Path) -> Library | None:
    """The library that ``recipe`` would build, where it has been built."""
    return _read(cache / recipe.key, recipe.backend)


def build_library(
    recipe: Recipe, cache: Path, *, jobs: int, force: bool = False, patience: Patience | None = None
) -> Library:
    """The library of ``recipe`` in ``cache``, built where it is not there.

    Of several processes that ask at once one builds, and the others take what it built.

    Args:
        recipe: What to build.
        cache: Folder of all results; is made.
        jobs: Compilers to run at once.
        force: Build also where the result is there, and replace it.
        patience: How long to wait for another process that builds it.

    Raises:
        KernelsUnavailableError: a compiler failed, now or when the same was tried before, or the cache cannot be
            written.
    """
    folder, failed = cache / recipe.key, _failure_log(cache, recipe)
    before = _identity(folder) if force else None
    if force:
        failed.unlink(missing_ok=True)
    elif failed.exists():
        # The key has everything that decides: trying again would cost every start a minute.
        raise KernelsUnavailableError(_failure(recipe, failed))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with build_lock(
            cache / f"{recipe.key}.lock", lambda: _identity(folder) not in {None, before}, patience or Patience()
        ) as ours:
            if ours:
                _remove_abandoned(cache, recipe.key)
                return _build(recipe, folder, jobs=jobs, replace=force)
    except OSError as error:
        raise KernelsUnavailableError(
            f"the cache of kernels {cache} cannot be used ({error}); set MEGATRON_EXT_KERNEL_CACHE to another folder"
        ) from error
    library = _read(folder, recipe.backend)
    assert library is not None, "a published library has gone"
    return library


def prebuilt_library(backend: Backend, devices: Iterable[tuple[int, int]] = ()) -> Library | None:
    """The library that the installation compiled ahead of time, where it fits sources, torch, CPU and devices."""
    return _first_fitting([prebuilt_folder() / backend], backend, devices)


def fitting_library(backend: Backend, cache: Path, devices: Iterable[tuple[int, int]] = ()) -> Library | None:
    """A library of the cache that fits this machine, whatever compiled it: for machines without a compiler."""
    return _first_fitting(sorted(cache.glob(f"{backend}-*/")), backend, devices)


def _first_fitting(folders: Iterable[Path], backend: Backend, devices: Iterable[tuple[int, int]]) -> Library | None:
    sources, major, features = digest(source_folder(), backend), find_torch().major, cpu_features()
    for folder in folders:
        facts = _facts(folder)
        if facts is None or facts["sources"] != sources or facts["torch_major"] != major:
            continue
        fits_cpu = facts["machine"] == platform.machine() and set(facts["features"]) <= features
        if fits_cpu and all(runs_on(facts["architectures"], device) for device in devices):
            return _read(folder, backend)
    return None


def _build(recipe: Recipe, folder: Path, *, jobs: int, replace: bool) -> Library:
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}{_PARTIAL}", dir=folder.parent))
    try:
        replace_text(partial / "owner.json", json.dumps(vars(Owner.here())))
        start = time.monotonic()
        _run_ninja(recipe, partial, jobs=jobs)
        facts = {**recipe.facts(), "seconds": round(time.monotonic() - start, 1), "host": socket.gethostname()}
        for leftover in (*partial.glob("*.o"), *partial.glob(".ninja*"), partial / "owner.json"):
            leftover.unlink()
        sync(partial / recipe.file)
        replace_text(partial / _FACTS, json.dumps(facts, indent=1) + "\n")
        _publish(partial, folder, replace=replace)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    library = _read(folder, recipe.backend, built_now=True)
    assert library is not None, "a library was published without its facts"
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


def _publish(partial: Path, folder: Path, *, replace: bool) -> None:
    """Make ``partial`` the result in one go; what is there already stays, or makes room with ``replace``."""
    if not replace and _facts(folder) is not None:
        return  # by another process, which took the lock for stale; what it built is as good
    os.chmod(partial, 0o755)  # noqa: PTH101 - mkdtemp made it private
    aside = partial.with_name(f"{partial.name}.old")
    if folder.exists():
        folder.rename(aside)
    try:
        partial.rename(folder)
    except OSError:
        if _facts(folder) is None:
            raise
    shutil.rmtree(aside, ignore_errors=True)
    sync(folder.parent)


def _remove_abandoned(cache: Path, key: str) -> None:
    """Remove what builds of the same key have left whose process has ended."""
    for folder in cache.glob(f"{key}{_PARTIAL}*"):
        try:
            owner = Owner(**json.loads((folder / "owner.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if owner.has_ended:
            shutil.rmtree(folder, ignore_errors=True)


def _read(folder: Path, backend: Backend, *, built_now: bool = False) -> Library | None:
    facts = _facts(folder)
    path = folder / f"libmegatron_ext_{backend}.so"
    if facts is None or not path.is_file():
        return None
    return Library(backend, path, float(facts["seconds"]), built_now, tuple(facts["architectures"]))


def _facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells one publication from the next; None where there is none."""
    try:
        status = (folder / _FACTS).stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns
