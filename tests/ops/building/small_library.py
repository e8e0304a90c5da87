"""A library of three lines, so that tests of the build take no time to compile; its compiler waits for a file to go.

Run as a program it builds the library: ``python -m tests.ops.building.small_library FOLDER``.
"""

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from megatron_ext.ops.building.builder import Library, build_library
from megatron_ext.ops.building.recipe import Recipe, digest, recipe_for
from megatron_ext.runtime.environment import KernelEnvironment

_COMPILER = """#!/bin/sh
case "$*" in *" -c "*) echo "$$" >> {folder}/compiled; while [ -e {folder}/wait ]; do sleep 0.1; done;; esac
exec {real} "$@"
"""


def small_recipe(folder: Path) -> Recipe:
    """The recipe; its sources and its compiler are in ``folder`` and are made where they are not there."""
    csrc, compiler = folder / "csrc", folder / "compiler"
    if not csrc.exists():
        for part, names in {
            "common": ["x.h", "other.h"],
            "bindings": ["schema.cpp", "cpu.cpp"],
            "cpu": ["a.cpp"],
        }.items():
            (csrc / part).mkdir(parents=True)
            for name in names:
                text = f'#include "../common/x.h"\nextern "C" int mx_{part}_{name[:-4]}() {{ return 42; }}\n'
                text = text if name.endswith(".cpp") else ""
                (csrc / part / name).write_text(text, encoding="utf-8")
        compiler.write_text(_COMPILER.format(folder=folder, real=shutil.which("g++")), encoding="utf-8")
        compiler.chmod(0o755)
    recipe = recipe_for("cpu", KernelEnvironment(folder / "cache", str(compiler), None, None, 1, None))
    return replace(recipe, folder=csrc, sources=digest(csrc, "cpu"))


def build_small(folder: Path, *, force: bool = False) -> Library:
    return build_library(small_recipe(folder), folder / "cache", jobs=1, force=force)


def compilations(folder: Path) -> int:
    """How often a file was compiled so far; the library has three."""
    log = folder / "compiled"
    return len(log.read_text(encoding="utf-8").splitlines()) if log.exists() else 0


if __name__ == "__main__":
    build_small(Path(sys.argv[1]))
