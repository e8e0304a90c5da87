"""Sum and maximum of the square roots of Adam's second moment, of every backend against float64."""

import pytest
import torch

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, cpu, normal, same_bits
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import adam_variance

# One element, less than a vector, what is left over behind vectors, and more than three blocks take at once
# (3 x 512 threads x 4 vectors).
COUNTS = [1, 3, 8, 31, 1025, 16384, 30001]
PARTITIONS = 3

EVERYWHERE = {
    "test_sum_and_maximum": [(1, F32), (8, BF16), (31, F32), (1025, F16), (30001, F32)],
}


def _second_moments(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Over many orders of magnitude, as gradients' squares are; the largest is the last."""
    exponents = normal((count,), torch.float64, seed=1, scale=2, mean=-2)
    values = (10**exponents).clamp(max=1e3)
    values[-1] = 2e3
    return values.to(dtype)


def _check(got: torch.Tensor, v: torch.Tensor) -> None:
    roots = v.double().sqrt()
    exact = torch.stack([roots.sum(), roots.max()])
    assert ((cpu(got) - exact).abs() <= 1e-7 * exact).all(), (got, exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_sum_and_maximum(backend: KernelBackend, count: int, dtype: torch.dtype) -> None:
    v = _second_moments(count, dtype)
    _check(adam_variance(backend, v, partitions=PARTITIONS)["result"], v)


@pytest.mark.parametrize("skipped", [1, 3, 5])
def test_values_that_begin_anywhere(backend: KernelBackend, skipped: int) -> None:
    """A parameter's part of a flat buffer, with NaN before it."""
    for dtype in FLOATS:
        for count in (2, 100, 4099):
            v = torch.cat([torch.full((skipped,), float("nan"), dtype=dtype), _second_moments(count, dtype)])
            _check(adam_variance(backend, v, partitions=PARTITIONS, skipped=skipped)["result"], v[skipped:])


def test_zeros_and_nothing(backend: KernelBackend) -> None:
    for count in (0, 100):
        assert cpu(adam_variance(backend, torch.zeros(count), partitions=2)["result"]).tolist() == [0.0, 0.0]


def test_nan_is_not_hidden(backend: KernelBackend) -> None:
    for place in (0, 4000, 8191):
        v = torch.ones(8192)
        v[place] = float("nan")
        assert cpu(adam_variance(backend, v, partitions=PARTITIONS)["result"]).isnan().all()


def test_infinity(backend: KernelBackend) -> None:
    v = torch.ones(100)
    v[50] = float("inf")
    assert cpu(adam_variance(backend, v, partitions=PARTITIONS)["result"]).tolist() == [float("inf")] * 2


@pytest.mark.parametrize("partitions", [1, 40, 600])
def test_any_number_of_partitions(backend: KernelBackend, partitions: int) -> None:
    v = _second_moments(5000, torch.float32)
    first = adam_variance(backend, v, partitions=partitions)["result"]
    _check(first, v)
    same_bits("result", adam_variance(backend, v, partitions=partitions)["result"], first)
