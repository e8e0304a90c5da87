"""The backend that runs kernels on the emulated GPU: CUDA sources, compiled by g++ into a Python module."""

import hashlib
import importlib.machinery
import importlib.util
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from tests.kernels.building import SOURCES, CannotBuildError, Step, make, python_flags, tool, version_of
from tests.kernels.interface import STREAM, Argument, Guarded, GuardedMemory, KernelError, addresses, check_canaries

FOLDER = Path(__file__).parent
LANGUAGE = FOLDER / "cuda_emulator.h"
COMMON_FLAGS = "-std=c++17 -O2 -g1 -fPIC -Wall -Wextra -Wno-unknown-pragmas -march=native"
# The calls before each access, whose answers are shadow.cpp's and not those of the sanitizer's runtime.
INSTRUMENTED = "-fsanitize=thread"
SANITIZED = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"

_C_FUNCTION = re.compile(r"^(?:extern \"C\" )?int(?:64_t)? mx_cuda_(\w+)\(", flags=re.MULTILINE)


def functions_of(sources: Sequence[Path]) -> list[str]:
    """Names, without mx_cuda_, of the C functions that the sources define."""
    return sorted(name for source in sources for name in _C_FUNCTION.findall(source.read_text(encoding="utf-8")))


def module_name(sources: Sequence[Path]) -> str:
    """Name of the module of ``sources``: pybind11 gives a process one module of a name, whatever its file."""
    return f"mx_emulator_{hashlib.sha256(' '.join(functions_of(sources)).encode()).hexdigest()[:8]}"


def emulator_module(sources: Sequence[Path], *, sanitized: bool = False, declarations: str = "") -> Path:
    """Builds the module of ``sources``; ``declarations``: those of their functions that csrc/common/abi.h lacks."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        raise CannotBuildError("the emulator's fibers are written for Linux on x86-64")
    compiler, version = tool("g++"), version_of("g++")
    flags = f"{COMMON_FLAGS} {SANITIZED}" if sanitized else COMMON_FLAGS
    kernel = f"{compiler} -x c++ -include {LANGUAGE} {flags} {'' if sanitized else INSTRUMENTED} -c $in -o $out"
    steps = [Step(kernel, (source,), ".o", version, (LANGUAGE,)) for source in sources]
    for name in ("machine", "shadow", "fiber", "module"):
        extra = _module_flags(sources, declarations) if name == "module" else ""
        steps.append(Step(f"{compiler} {flags} {extra} -c $in -o $out", (FOLDER / f"{name}.cpp",), ".o", version))
    link = f"{compiler} -shared {SANITIZED if sanitized else ''} $in -o $out"
    return make([Step(link, tuple(make(steps)), ".so", version)])[0]


def _module_flags(sources: Sequence[Path], declarations: str) -> str:
    defined = " ".join(f"MX_DEFINE({name});" for name in functions_of(sources))
    declared = f"'-DMX_DECLARATIONS={declarations}'" if declarations else ""
    named = f"-DMX_MODULE_NAME={module_name(sources)}"
    return f"{python_flags()} {named} {declared} '-DMX_FUNCTIONS={defined}' -fvisibility=hidden"


def load(path: Path, sources: Sequence[Path]) -> ModuleType:
    name = module_name(sources)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def kernels(root: Path = SOURCES) -> ModuleType:
    sources = sorted((root / "cuda").glob("*.cu"))
    if not sources:
        raise CannotBuildError("there are no kernels in csrc/cuda")
    # The slow test under sanitizers runs the same tests on another build.
    return load(emulator_module(sources, sanitized="KERNEL_TEST_SANITIZED" in os.environ), sources)


@dataclass(frozen=True)
class EmulatorBackend(Guarded):
    """The CUDA kernels, compiled by g++ and run by the emulator, in one order of threads and blocks."""

    order: str
    seed: int
    module: ModuleType

    def call(self, function: str, *arguments: Argument) -> None:
        values = addresses(function, arguments)
        tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
        self.module.configure(self.order, self.seed)
        self.module.watch(sorted({self.memory.region(tensor) for tensor in tensors}))
        try:
            status = getattr(self.module, function)(*values, STREAM)
        except self.module.Report as report:
            raise KernelError(function, 0, str(report)) from None
        if status != 0:
            raise KernelError(function, status)
        check_canaries(self.memory, function, arguments)

    def partitions(self, rows: int, cols: int) -> int:
        return int(self.module.partitions(rows, cols))


def emulator_backend(order: str) -> EmulatorBackend:
    return EmulatorBackend(f"emulator-{order}", GuardedMemory(), order, 1, kernels())
