"""One way to call a kernel on every machine that can run it.

A test takes the fixture ``backend``, copies its inputs with ``backend.tensor``, makes its outputs with
``backend.empty`` (NaN bytes, so that what a kernel leaves out is seen), and calls a function of csrc/common/abi.h.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch

from tests.kernels.abi import addresses
from tests.kernels.emulator import build as emulator_build
from tests.kernels.guarded import GuardedMemory

Argument = torch.Tensor | int | float | None
STREAM = 0


class KernelError(Exception):
    """A kernel was refused (``status``, as abi.h has it) or did something that is wrong (``report``)."""

    def __init__(self, function: str, status: int, report: str = "") -> None:
        super().__init__(f"{function}: {report or f'status {status}'}")
        self.status = status
        self.report = report


class KernelBackend(Protocol):
    """A machine, or one way to run it."""

    @property
    def name(self) -> str:
        """The name that the fixture's parameter has."""
        ...

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        """A copy in the backend's memory.

        It starts at a multiple of ``alignment`` bytes; where that is the element size it ends at an unreadable page (a
        device has none). Nothing behind or before it may be touched.
        """
        ...

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        """The same, filled with NaN bytes."""
        ...

    def call(self, function: str, *arguments: Argument) -> None:
        """Calls ``function`` of abi.h, without its last argument; raises ``KernelError``."""
        ...

    def partitions(self, rows: int, cols: int) -> int:
        """How many partial column sums the workspace of a backward pass is to hold."""
        ...


def check_canaries(memory: GuardedMemory, function: str, arguments: tuple[Argument, ...]) -> None:
    """Raises ``KernelError`` where memory beside a tensor was written."""
    for place, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and memory.damaged(argument):
            raise KernelError(function, 0, f"memory beside argument {place} was written")


@dataclass(frozen=True)
class EmulatorBackend:
    """The CUDA kernels, compiled by g++ and run by csrc/emulator, in one order of threads and blocks."""

    name: str
    order: str
    seed: int
    module: ModuleType
    memory: GuardedMemory

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        return self.memory.copy(value, alignment=alignment)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        return self.memory.empty(*shape, dtype=dtype, alignment=alignment)

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


def emulator(order: str) -> KernelBackend:
    """The emulator in one order."""
    return EmulatorBackend(f"emulator-{order}", order, 1, emulator_build.kernels(), GuardedMemory())


# Each makes its backend or raises ``CannotBuildError`` with the reason why it cannot be had here.
BACKENDS: dict[str, Callable[[], KernelBackend]] = {
    "emulator-forward": lambda: emulator("forward"),
    "emulator-reverse": lambda: emulator("reverse"),
    "emulator-random": lambda: emulator("random"),
}
MARKS: dict[str, Any] = {}
