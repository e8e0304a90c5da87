"""Builds are whole or not there, happen once, and do not wait for one that was killed."""

import ctypes
import errno
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch  # noqa: F401 - brings the libraries that the built one asks for

from megatron_ext.ops.building import builder
from megatron_ext.ops.building.builder import cached_library, fitting_library, prebuilt_library
from megatron_ext.ops.building.recipe import BACKENDS, Recipe, digest, source_folder, translation_units
from megatron_ext.ops.building.toolchain import KernelsUnavailableError
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.run_lock import file_lock
from tests.ops.building.small_library import build_small, compilations, small_recipe

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def build_elsewhere(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.ops.building.small_library", str(folder)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True)


def names(cache: Path) -> list[str]:
    """What is in the cache; a lock's file stays."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def wait_for_the_first_compilation(folder: Path) -> None:
    for _ in range(600):
        if compilations(folder):
            return
        time.sleep(0.05)
    raise AssertionError("nothing was compiled")


def test_what_was_built_loads_and_is_found_again(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    assert cached_library(recipe, tmp_path / "cache") is None
    library = build_small(tmp_path)
    assert library.built_now
    assert ctypes.CDLL(str(library.path)).mx_cpu_a() == 42
    again = build_small(tmp_path)
    assert again == replace(library, built_now=False) == cached_library(recipe, tmp_path / "cache")
    assert compilations(tmp_path) == 3
    assert names(tmp_path / "cache") == [recipe.key]
    built = json.loads((library.path.parent / "build.json").read_text(encoding="utf-8"))
    assert built["sources"] == recipe.sources


def test_force_builds_again_and_replaces(tmp_path: Path) -> None:
    first = build_small(tmp_path)
    before = (first.path.parent / "build.json").stat().st_ino
    second = build_small(tmp_path, force=True)
    assert second.built_now
    assert second.path == first.path
    assert (second.path.parent / "build.json").stat().st_ino != before
    assert compilations(tmp_path) == 6


@pytest.mark.parametrize("with_its_children", [True, False])
def test_a_build_that_was_killed_in_the_middle_keeps_nobody_waiting(tmp_path: Path, with_its_children: bool) -> None:
    small_recipe(tmp_path)
    (tmp_path / "wait").touch()
    killed = build_elsewhere(tmp_path)
    wait_for_the_first_compilation(tmp_path)
    (os.killpg if with_its_children else os.kill)(killed.pid, signal.SIGKILL)
    killed.wait()
    (partial,) = names(tmp_path / "cache")
    assert ".partial-" in partial
    (tmp_path / "wait").unlink()
    start = time.monotonic()
    library = build_small(tmp_path)
    assert library.built_now
    assert time.monotonic() - start < 20
    assert ctypes.CDLL(str(library.path)).mx_cpu_a() == 42
    assert names(tmp_path / "cache") == [small_recipe(tmp_path).key]


def test_who_waits_says_for_what_and_does_not_wait_for_ever(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.INFO)
    recipe, cache = small_recipe(tmp_path), tmp_path / "cache"
    lock = cache / f"{recipe.key}.lock"
    cache.mkdir()
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    with file_lock(lock):
        library = builder.build_library(recipe, cache, jobs=1, patience_seconds=0.2)
    assert library.built_now
    assert [record.getMessage() for record in caplog.records if record.name == LOGGER.name] == [
        f"waiting for the cpu kernels, which another process makes ({holder}; lock {lock})",
        f"{lock} was held for 0 s ({holder}); going on without it",
    ]


def test_without_locks_the_first_to_finish_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def second(recipe: Recipe, partial: Path, *, jobs: int) -> None:
        (tmp_path / "wait").unlink()
        assert other.wait(60) == 0
        run_ninja(recipe, partial, jobs=jobs)

    small_recipe(tmp_path)
    (tmp_path / "wait").touch()
    other, run_ninja = build_elsewhere(tmp_path), builder._run_ninja
    wait_for_the_first_compilation(tmp_path)
    monkeypatch.setattr("fcntl.flock", refuse)
    monkeypatch.setattr(builder, "_run_ninja", second)
    library = build_small(tmp_path)
    assert not library.built_now
    assert ctypes.CDLL(str(library.path)).mx_cpu_a() == 42
    assert compilations(tmp_path) == 6
    assert names(tmp_path / "cache") == [small_recipe(tmp_path).key]


def test_what_was_published_and_is_damaged_is_replaced(tmp_path: Path) -> None:
    (build_small(tmp_path).path.parent / "build.json").unlink()
    assert build_small(tmp_path).built_now
    assert names(tmp_path / "cache") == [small_recipe(tmp_path).key]


def test_several_at_once_build_once(tmp_path: Path) -> None:
    small_recipe(tmp_path)
    (tmp_path / "wait").touch()
    others = [build_elsewhere(tmp_path) for _ in range(3)]
    wait_for_the_first_compilation(tmp_path)
    (tmp_path / "wait").unlink()
    assert [other.wait(60) for other in others] == [0, 0, 0]
    assert compilations(tmp_path) == 3


def test_a_compiler_that_fails_is_quoted_and_not_tried_again_unless_forced(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    broken = recipe.folder / "cpu" / "a.cpp"
    working = broken.read_text(encoding="utf-8")
    broken.write_text("int x = undeclared;\n", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(KernelsUnavailableError, match=r"do not compile here: .*undeclared.*--cpu --force"):
            build_small(tmp_path)
    assert compilations(tmp_path) == 1
    (log,) = (tmp_path / "cache").glob("*.failed.log")
    assert "undeclared" in log.read_text(encoding="utf-8")
    with pytest.raises(KernelsUnavailableError):
        build_small(tmp_path, force=True)
    assert compilations(tmp_path) == 2
    broken.write_text(working, encoding="utf-8")
    assert build_small(tmp_path).built_now


def test_the_key_follows_sources_tools_and_cpu(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    assert small_recipe(tmp_path).key == recipe.key
    variants = [
        replace(recipe, compiler=replace(recipe.compiler, version=(99,))),
        replace(recipe, features=recipe.features | {"avx9000"}),
        replace(recipe, torch=replace(recipe.torch, version="3.0.0")),
        replace(recipe, sources="0"),
    ]
    assert len({recipe.key, *(variant.key for variant in variants)}) == 5
    assert replace(recipe, torch=replace(recipe.torch, version="2.99.0")).key == recipe.key
    (recipe.folder / "common" / "other.h").write_text("// nobody includes it\n", encoding="utf-8")
    assert small_recipe(tmp_path).key == recipe.key
    (recipe.folder / "common" / "x.h").write_text("// changed\n", encoding="utf-8")
    assert small_recipe(tmp_path).key != recipe.key


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(KernelsUnavailableError, match="set MEGATRON_EXT_KERNEL_CACHE"):
        builder.build_library(recipe, tmp_path / "file", jobs=1)


def _pretend(monkeypatch: pytest.MonkeyPatch, recipe: Recipe, *, ahead: Path | None = None) -> None:
    monkeypatch.setattr(builder, "source_folder", lambda: recipe.folder)
    if ahead is not None:
        monkeypatch.setattr(builder, "prebuilt_folder", lambda: ahead)


def test_without_a_compiler_a_library_of_the_cache_serves_if_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, library = small_recipe(tmp_path), build_small(tmp_path)
    _pretend(monkeypatch, recipe)
    assert fitting_library("cpu", tmp_path / "cache") == replace(library, built_now=False)
    monkeypatch.setattr(builder, "cpu_features", lambda: frozenset({"sse"}))
    assert fitting_library("cpu", tmp_path / "cache") is None


def test_what_the_installation_compiled_is_used_while_the_sources_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, library = small_recipe(tmp_path), build_small(tmp_path)
    _pretend(monkeypatch, recipe, ahead=tmp_path / "prebuilt")
    assert prebuilt_library("cpu") is None
    shutil.copytree(library.path.parent, tmp_path / "prebuilt" / "cpu")
    found = prebuilt_library("cpu")
    assert found is not None
    assert found.path == tmp_path / "prebuilt" / "cpu" / recipe.file
    (recipe.folder / "cpu" / "a.cpp").write_text("// edited\n", encoding="utf-8")
    assert prebuilt_library("cpu") is None


def test_a_library_is_made_of_what_its_sources_include() -> None:
    folder = source_folder()
    assert digest(folder, "cpu") != digest(folder, "cuda")
    for backend in BACKENDS:
        units = translation_units(folder, backend)
        assert all(unit.is_file() for unit in units)
        assert len(units) > 5
