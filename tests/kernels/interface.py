"""What a test knows of a machine that runs kernels.

A test takes the fixture ``backend``, copies its inputs with ``backend.tensor``, makes its outputs with
``backend.empty`` (NaN bytes, so that what a kernel leaves out is seen), and calls a function of csrc/common/abi.h.
"""

from typing import Protocol

import torch

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
