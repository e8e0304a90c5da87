"""The backend that runs nvcc's PTX: launches are recorded as the kernels' host code makes them, then run."""

from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from tests.kernels.building import kernel_sources, ptx_of
from tests.kernels.emulator.backend import kernels
from tests.kernels.interface import STREAM, Argument, Guarded, GuardedMemory, KernelError, addresses, check_canaries
from tests.kernels.ptx.machine import Program, run_launch
from tests.kernels.ptx.parser import Kernel, PtxError, parse_kernel, parse_module
from tests.kernels.ptx.program import Dimensions, Launch
from tests.kernels.ptx.values import Array

Recorded = tuple[str, Dimensions, Dimensions, int, list[bytes]]


@dataclass
class PtxModule:
    """Kernels of some PTX files, read when they are first run."""

    texts: dict[str, str]
    programs: dict[str, Program] = field(default_factory=dict)

    @staticmethod
    def of_files(paths: list[Path]) -> "PtxModule":
        texts: dict[str, str] = {}
        for path in paths:
            texts |= parse_module(path.read_text(encoding="utf-8"))
        return PtxModule(texts)

    def program(self, name: str) -> Program:
        """A kernel by its mangled name."""
        if name not in self.programs:
            if name not in self.texts:
                raise PtxError(f"nvcc made no kernel {name}")
            self.programs[name] = Program(parse_kernel(self.texts[name]))
        return self.programs[name]

    def run(self, recorded: Recorded, tensors: list[tuple[int, int]]) -> None:
        name, grid, block, dynamic_shared, arguments = recorded
        program = self.program(name)
        parameters = parameter_space(program.kernel, arguments)
        run_launch(Launch(program.kernel, grid, block, dynamic_shared, parameters), program.code, tensors)


def parameter_space(kernel: Kernel, arguments: list[bytes]) -> Array:
    """The bytes of the parameters, each where the kernel looks for it."""
    space = np.zeros(kernel.parameter_bytes, np.uint8)
    for (name, variable), argument in zip(kernel.parameters.items(), arguments, strict=True):
        if len(argument) != variable.size:
            raise PtxError(f"{kernel.name}: {name} has {variable.size} bytes under nvcc and {len(argument)} under g++")
        space[variable.offset : variable.offset + variable.size] = np.frombuffer(argument, np.uint8)
    return space


@dataclass(frozen=True)
class PtxBackend(Guarded):
    """nvcc's PTX for one architecture, interpreted."""

    host: ModuleType
    ptx: PtxModule

    def call(self, function: str, *arguments: Argument) -> None:
        values = addresses(function, arguments)
        self.host.configure("record", 0)
        self.host.recorded()
        status = getattr(self.host, function)(*values, STREAM)
        if status != 0:
            raise KernelError(function, status)
        regions = {self.memory.region(each) for each in arguments if isinstance(each, torch.Tensor)}
        tensors = [(data, data_end - data) for _, data, data_end, _ in regions]
        for launch in self.host.recorded():
            try:
                self.ptx.run(launch, tensors)
            except PtxError as report:
                raise KernelError(function, 0, str(report)) from None
        check_canaries(self.memory, function, arguments)

    def partitions(self, rows: int, cols: int) -> int:
        return int(self.host.partitions(rows, cols))


def ptx_backend(architecture: int) -> PtxBackend:
    files = ptx_of(kernel_sources(), architecture)
    return PtxBackend(f"ptx-{architecture}", GuardedMemory(), kernels(), PtxModule.of_files(files))
