"""Builds for the tests: each output is a file named by a hash of all that goes into it.

That hash is of the command, of the compiler's version, and of the sources with every header that they include. So
nothing is built twice, by whichever test, session or copy of the sources, and nothing is ever out of date. ninja runs
what is missing; an output appears by a rename, so that two sessions that build one thing do not disturb each other.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import ninja
import pybind11

from megatron_ext.ops.building.recipe import NVCC_FLAGS

ROOT = Path(__file__).parents[2]
# The mutation run has the tests build a copy of the sources.
SOURCES = Path(os.environ.get("KERNEL_TEST_SOURCES", ROOT / "csrc"))
BUILDS = ROOT / "build" / "kernel-tests"
JOBS = 2
# What stays after older outputs are removed: some times the number that one state of the sources has.
KEPT_OUTPUTS = 2000

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', flags=re.MULTILINE)


class CannotBuildError(Exception):
    """A tool is missing: what is to be built cannot be had on this machine."""


@dataclass(frozen=True)
class Step:
    """One command, with ``$in``, ``$out`` and ``$log`` for paths; sources may include only by relative paths.

    ``$log`` is ``$out`` with ``.log`` behind it, for what the command prints.
    """

    command: str
    inputs: tuple[Path, ...]
    suffix: str
    toolchain: str
    included: tuple[Path, ...] = ()  # what the command has a source include, which its text does not say


@cache
def tool(name: str) -> Path:
    """Where a program is; raises ``CannotBuildError`` where it is not."""
    found = shutil.which(name)
    if found is None:
        raise CannotBuildError(f"{name} is not on PATH")
    return Path(found)


@cache
def version_of(name: str) -> str:
    """What a compiler says of itself, to be part of a build's hash."""
    return subprocess.run([tool(name), "--version"], capture_output=True, text=True, check=True).stdout


def python_flags() -> str:
    return f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"


def with_includes(source: Path) -> list[Path]:
    """A source and what it includes in quotes, directly or through others."""
    found: list[Path] = []
    waiting = [source.resolve()]
    while waiting:
        path = waiting.pop()
        if path in found or not path.is_file():
            continue
        found.append(path)
        if path.suffix in {".cu", ".cuh", ".h", ".cpp"}:
            waiting += [(path.parent / name).resolve() for name in _INCLUDE.findall(path.read_text(encoding="utf-8"))]
    return sorted(found, key=lambda path: path.name)


def output_of(step: Step) -> Path:
    digest = hashlib.sha256(f"{step.toolchain}\n{step.command}\n{step.suffix}\n".encode())
    for source in (*step.inputs, *step.included):
        if source.parent == BUILDS:
            digest.update(source.name.encode())
            continue
        for path in with_includes(source):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return BUILDS / f"{step.inputs[0].stem.split('-')[0]}-{digest.hexdigest()[:20]}{step.suffix}"


def make(steps: Sequence[Step]) -> list[Path]:
    """Runs the steps whose outputs are missing, two at a time; returns all outputs.

    Raises AssertionError if a command failed, with what it printed.
    """
    outputs = [output_of(step) for step in steps]
    missing = {output: step for output, step in zip(outputs, steps, strict=True) if not output.exists()}
    for output in outputs:
        if output not in missing:
            output.touch()
    if missing:
        BUILDS.mkdir(parents=True, exist_ok=True)
        _forget_old()
        with tempfile.TemporaryDirectory(prefix="kernel-build-") as folder:
            _run(Path(folder), missing)
    return outputs


def _run(folder: Path, missing: dict[Path, Step]) -> None:
    lines = []
    for number, (output, step) in enumerate(missing.items()):
        inputs = " ".join(str(path) for path in step.inputs)
        part, log = f"{output}.{folder.name}.part", f"{output}.log"
        command = step.command.replace("$in", inputs).replace("$out", part).replace("$log", f"{part}.log")
        keep = f" && if test -e {part}.log; then mv {part}.log {log}; fi && mv {part} {output}"
        lines += [f"rule r{number}", f"  command = {command}{keep}", f"build {output}: r{number}"]
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    command_line = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder), "-j", str(JOBS)]
    done = subprocess.run(command_line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def _forget_old() -> None:
    old = sorted(BUILDS.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_OUTPUTS:]
    for path in old:
        path.unlink(missing_ok=True)


# Those of the build, but for the line numbers, which change no instruction.
FLAGS = " ".join(flag for flag in NVCC_FLAGS if flag != "-lineinfo")


def kernel_sources(root: Path = SOURCES) -> list[Path]:
    sources = sorted((root / "cuda").glob("*.cu"))
    if not sources:
        raise CannotBuildError("there are no kernels in csrc/cuda")
    return sources


@cache
def newest_architecture() -> int:
    done = subprocess.run([tool("nvcc"), "--list-gpu-arch"], capture_output=True, text=True, check=True)
    return max(int(number) for number in re.findall(r"compute_(\d+)", done.stdout))


def ptx_of(sources: Sequence[Path], architecture: int) -> list[Path]:
    command = f"{tool('nvcc')} {FLAGS} -ptx -arch=compute_{architecture} $in -o $out"
    return make([Step(command, (source,), ".ptx", version_of("nvcc")) for source in sources])


def device_code_of(sources: Sequence[Path], architecture: int) -> list[Path]:
    """Device code of each source for ``sm_ARCHITECTURE``, from its PTX; ptxas's report lies beside it (``.log``)."""
    command = f"{tool('ptxas')} -v -arch=sm_{architecture} $in -o $out > $log 2>&1"
    return make([Step(command, (ptx,), ".cubin", version_of("ptxas")) for ptx in ptx_of(sources, architecture)])


def device_library(sources: Sequence[Path]) -> Path:
    """The kernels' C interface for the devices of this machine."""
    compile_one = f"{tool('nvcc')} {FLAGS} -arch=native -c $in -o $out"
    objects = make([Step(compile_one, (source,), ".o", version_of("nvcc")) for source in sources])
    link = f"{tool('nvcc')} -shared -cudart static $in -o $out"
    return make([Step(link, tuple(objects), ".so", version_of("nvcc"))])[0]
