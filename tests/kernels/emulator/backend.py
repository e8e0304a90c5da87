"""The backend that runs kernels on the emulated GPU."""

from dataclasses import dataclass
from types import ModuleType

import torch

from tests.kernels.emulator.build import kernels
from tests.kernels.interface import STREAM, Argument, Guarded, GuardedMemory, KernelError, addresses, check_canaries


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
    """The emulator in one order."""
    return EmulatorBackend(f"emulator-{order}", GuardedMemory(), order, 1, kernels())
