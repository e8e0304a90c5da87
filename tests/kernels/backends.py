"""The machines that can run kernels; the fixture ``backend`` has one parameter for each.

Two of them are shared libraries with the C interface: the CPU's kernels, and on a GPU the device's.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from megatron_ext.ops.building.recipe import KERNEL_FLAGS, source_folder
from megatron_ext.ops.building.toolchain import KernelsUnavailableError
from megatron_ext.ops.loading import load_operators
from tests.kernels.building import (
    SOURCES,
    CannotBuildError,
    Step,
    device_library,
    kernel_sources,
    make,
    tool,
    version_of,
)
from tests.kernels.emulator.backend import emulator_backend
from tests.kernels.interface import (
    Argument,
    Guarded,
    GuardedMemory,
    KernelBackend,
    KernelError,
    Parameter,
    addresses,
    check_canaries,
    functions,
)
from tests.kernels.ptx.backend import ptx_backend

_C_TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


# What torch's thread pool is to the kernels in the program (csrc/common/abi.h).
Body = Callable[[int, int, int | None], None]
BODY: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
EXECUTOR: Any = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, BODY, ctypes.c_void_p)
THREADS = 4


def _serial(begin: int, end: int, _grain: int, body: Body, context: int | None) -> None:
    if begin < end:
        body(begin, end, context)


def _threaded(begin: int, end: int, grain: int, body: Body, context: int | None) -> None:
    """Pieces as small as they may be, the last ones first, several at a time (ctypes lets go of the interpreter)."""
    starts = range(begin, end, max(grain, 1))
    with ThreadPoolExecutor(THREADS) as pool:
        done = [pool.submit(body, start, min(start + max(grain, 1), end), context) for start in reversed(starts)]
        for each in done:
            each.result()


SERIAL = EXECUTOR(_serial)
THREADED = EXECUTOR(_threaded)


def _c_type(parameter: Parameter) -> Any:
    return ctypes.c_void_p if parameter.pointer else _C_TYPES[parameter.base]


@dataclass(frozen=True)
class Library:
    """Functions ``mx_PREFIX_*`` of a shared library; ``last`` is what each is given last: an executor or a stream."""

    loaded: ctypes.CDLL
    prefix: str

    @staticmethod
    def of(path: Path, prefix: str) -> "Library":
        return Library(ctypes.CDLL(str(path)), prefix)

    def call(self, function: str, arguments: tuple[Argument, ...], last: Any) -> int:
        c_function = self._named(function)
        c_types = [_c_type(each) for each in functions()[function]]
        c_function.restype = ctypes.c_int
        values = [c_type(value) for c_type, value in zip(c_types, addresses(function, arguments), strict=True)]
        return int(c_function(*values, last))

    def partitions(self, rows: int, cols: int) -> int:
        function = self._named("partitions")
        function.argtypes, function.restype = [ctypes.c_int64, ctypes.c_int64], ctypes.c_int64
        return int(function(rows, cols))

    def _named(self, function: str) -> Any:
        try:
            return self.loaded[f"mx_{self.prefix}_{function}"]
        except AttributeError:
            raise CannotBuildError(f"the library has no mx_{self.prefix}_{function}") from None


@dataclass(frozen=True)
class CpuBackend(Guarded):
    library: Library
    executor: Any

    def call(self, function: str, *arguments: Argument) -> None:
        status = self.library.call(function, arguments, self.executor)
        if status != 0:
            raise KernelError(function, status)
        check_canaries(self.memory, function, arguments)

    def partitions(self, rows: int, cols: int) -> int:
        return self.library.partitions(rows, cols)


@dataclass(frozen=True)
class CudaBackend:
    name: str
    library: Library
    device: torch.device

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        return self.empty(*value.shape, dtype=value.dtype, alignment=alignment).copy_(value)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """NaN bytes; with a small ``alignment`` it starts at a multiple of no more than that."""
        count = torch.Size(shape).numel()
        shift = 0 if alignment >= 16 else max(alignment // dtype.itemsize, 1)
        poisoned = torch.full(((count + shift) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=self.device)
        return poisoned.view(dtype)[shift:].view(shape)

    def call(self, function: str, *arguments: Argument) -> None:
        stream = torch.cuda.current_stream(self.device)
        status = self.library.call(function, arguments, ctypes.c_void_p(stream.cuda_stream))
        if status != 0:
            raise KernelError(function, status)
        stream.synchronize()

    def partitions(self, rows: int, cols: int) -> int:
        return self.library.partitions(rows, cols)


def cpu_library(root: Path = SOURCES, flags: tuple[str, ...] = KERNEL_FLAGS) -> Path:
    """Builds csrc/cpu (below ``root``) with the flags that the program builds it with."""
    sources = sorted((root / "cpu").glob("*.cpp"))
    if not sources:
        raise CannotBuildError("there are no kernels in csrc/cpu")
    compiler, version = tool("g++"), version_of("g++")
    command = f"{compiler} {' '.join(flags)} -c $in -o $out"
    objects = make([Step(command, (source,), ".o", version) for source in sources])
    return make([Step(f"{compiler} -shared $in -o $out", tuple(objects), ".so", version)])[0]


@cache
def _cpu(root: Path) -> Library:
    # Another architecture than this machine's own: x86-64 takes the paths without AVX.
    march = os.environ.get("KERNEL_TEST_MARCH")
    if march is None and root == source_folder():
        return Library.of(_program_library(), "cpu")
    flags = tuple(f"-march={march or 'native'}" if flag == "-march=native" else flag for flag in KERNEL_FLAGS)
    return Library.of(cpu_library(root, flags), "cpu")


def _program_library() -> Path:
    """What the program itself loads."""
    try:
        return load_operators("cpu").path
    except KernelsUnavailableError as error:
        raise CannotBuildError(str(error)) from error


def cpu_backend(*, threads: bool, root: Path = SOURCES) -> CpuBackend:
    """The CPU, with every function called for all work at once, or in small pieces on several threads."""
    return CpuBackend(
        "cpu-threads" if threads else "cpu-serial", GuardedMemory(), _cpu(root), THREADED if threads else SERIAL
    )


def cuda_backend(root: Path = SOURCES) -> CudaBackend:
    if not torch.cuda.is_available():
        raise CannotBuildError("torch sees no GPU")
    library = Library.of(device_library(kernel_sources(root)), "cuda")
    return CudaBackend("cuda", library, torch.device("cuda", torch.cuda.current_device()))


__all__ = ["BACKENDS", "KernelBackend", "KernelError"]

# Each makes its backend or raises ``CannotBuildError`` with the reason why it cannot be had here.
BACKENDS: dict[str, Callable[[], KernelBackend]] = {
    **{f"emulator-{order}": partial(emulator_backend, order) for order in ("forward", "reverse", "random")},
    "cpu-serial": partial(cpu_backend, threads=False),
    "cpu-threads": partial(cpu_backend, threads=True),
    "cuda": cuda_backend,
    **{f"ptx-{architecture}": partial(ptx_backend, architecture) for architecture in (80, 90, 100)},
}
