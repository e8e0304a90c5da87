"""Compiles CUDA sources for the emulator, into a Python module."""

import importlib.machinery
import importlib.util
import platform
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.kernels.building import SOURCES, Build, CannotBuildError, Step, headers, make, python_flags, tool, version_of

MACHINE = SOURCES / "emulator"
COMMON_FLAGS = "-std=c++17 -O2 -g1 -fPIC -Wall -Wextra -march=native"
# The calls before each access, whose answers are csrc/emulator/shadow.cpp's and not those of the sanitizer's runtime.
INSTRUMENTED = "-fsanitize=thread"
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"

_C_FUNCTION = re.compile(r"^(?:extern \"C\" )?int(?:64_t)? mx_cuda_(\w+)\(", flags=re.MULTILINE)


def functions_of(sources: Sequence[Path]) -> list[str]:
    """Names, without mx_cuda_, of the C functions that the sources define."""
    return sorted(name for source in sources for name in _C_FUNCTION.findall(source.read_text(encoding="utf-8")))


def emulator_build(sources: Sequence[Path], root: Path, *, sanitized: bool = False) -> Build:
    """The module of ``sources``, below ``root`` (the folder csrc, or a copy of it)."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise CannotBuildError("the emulator's fibers are written for Linux on x86-64")
    compiler = tool("g++")
    module = "mx_emulator"
    shared = f"{COMMON_FLAGS} {SANITIZED if sanitized else ''} -I{root / 'emulator'} -I{root / 'common'}"
    steps = []
    for source in sources:
        flags = shared if sanitized else f"{shared} {INSTRUMENTED}"
        steps.append(Step(f"{compiler} -x c++ {flags} -c $in -o $out", (source,), f"{source.stem}.kernel.o"))
    for name in ("machine", "shadow", "fiber", "module"):
        extra = f"{python_flags()} -DMX_MODULE_NAME={module} -I. -fvisibility=hidden" if name == "module" else ""
        steps.append(Step(f"{compiler} {shared} {extra} -c $in -o $out", (root / f"emulator/{name}.cpp",), f"{name}.o"))
    objects = tuple(Path(step.output) for step in steps)
    steps.append(Step(f"{compiler} -shared {SANITIZED if sanitized else ''} $in -o $out", objects, f"{module}.so"))
    return Build(
        name=f"emulator{'-sanitized' if sanitized else ''}",
        steps=tuple(steps),
        depends_on=headers(root),
        texts={"functions.inc": "".join(f"MX_DEFINE({name});\n" for name in functions_of(sources))},
        toolchain=version_of("g++"),
    )


def load(path: Path) -> ModuleType:
    """Imports a built module."""
    loader = importlib.machinery.ExtensionFileLoader(path.stem, str(path))
    spec = importlib.util.spec_from_loader(path.stem, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def kernels(root: Path = SOURCES) -> ModuleType:
    """The module of the project's kernels."""
    sources = sorted((root / "cuda").glob("*.cu"))
    if not sources:
        raise CannotBuildError("there are no kernels in csrc/cuda")
    return load(make(emulator_build(sources, root)) / "mx_emulator.so")
