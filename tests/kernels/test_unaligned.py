"""Tensors that begin in the middle of a vector: every op takes single elements there, and is as right."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from tests.kernels.accuracy import cpu
from tests.kernels.backends import KernelBackend
from tests.kernels.every_op import OPS, Results
from tests.kernels.thinning import Everywhere

EVERYWHERE: Everywhere = {}


@dataclass(frozen=True)
class Shifted:
    """A backend whose tensors begin one element behind a multiple of 16 bytes, and end where memory does."""

    backend: KernelBackend

    @property
    def name(self) -> str:
        return self.backend.name

    def tensor(self, value: torch.Tensor, *, alignment: int = 16) -> torch.Tensor:
        return self.empty(*value.shape, dtype=value.dtype, alignment=alignment).copy_(value)

    def empty(self, *shape: int, dtype: torch.dtype, alignment: int = 16) -> torch.Tensor:
        # Scratch memory and statistics are no views of anything: callers allocate them.
        if dtype in {torch.float64, torch.int64} or (dtype == torch.float32 and len(shape) == 3):
            return self.backend.empty(*shape, dtype=dtype, alignment=alignment)
        count = torch.Size(shape).numel()
        return self.backend.empty(count + 1, dtype=dtype, alignment=alignment)[1:].view(shape)

    def call(self, function: str, *arguments: torch.Tensor | int | float | None) -> None:
        self.backend.call(function, *arguments)

    def partitions(self, rows: int, cols: int) -> int:
        return self.backend.partitions(rows, cols)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("cols", [24, 264])
def test_results_are_those_of_aligned_tensors(
    backend: KernelBackend, op: Callable[[KernelBackend, int], Results], cols: int
) -> None:
    expected = op(backend, cols)
    for name, value in op(Shifted(backend), cols).items():
        got, right = cpu(value).double(), cpu(expected[name]).double()
        assert torch.equal(got.isfinite(), right.isfinite()), name
        # Sums in another order, rounded once: a unit in the last place of the largest.
        unit = max(torch.finfo(value.dtype).eps, 4 * torch.finfo(torch.float32).eps)
        assert (got - right).abs().max() <= 2 * unit * right.abs().max(), name
