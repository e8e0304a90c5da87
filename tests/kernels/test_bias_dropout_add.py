"""Bias, dropout and the residual add of every backend against float64."""

import pytest
import torch

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, dropout_factors, normal
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import QUIET, Noise, bias_dropout_add_backward, bias_dropout_add_forward

PARTITIONS = 2
NOISE = Noise(probability=0.1, seed=-(2**40) - 3)
# (rows, cols): as in test_bias_gelu.
SHAPES = [(3, 1), (150, 7), (150, 8), (9, 18), (9, 31), (70, 264), (9, 1025), (2, 16384)]

EVERYWHERE = {
    "test_with_dropout": [((3, 1), F32), ((150, 7), F16), ((150, 8), F32), ((70, 264), BF16)],
}


def _check(
    backend: KernelBackend, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], noise: Noise, *, bare: bool
) -> None:
    dtype, bias_dtype = dtypes
    x, residual, dy = (normal(shape, dtype, seed=seed) for seed in (1, 2, 3))
    bias = None if bare else normal(shape[1:], bias_dtype, seed=4)
    factors = dropout_factors(shape, noise.probability, noise.seed)
    shift, own_shift = (0, 0) if bias is None else (bias.double(), bias.to(dtype))
    got = bias_dropout_add_forward(backend, x, bias, residual, noise=noise)
    exact = residual.double() + (x.double() + shift) * factors
    check("y", got["y"], exact, residual + (x + own_shift) * factors.to(dtype))
    back = bias_dropout_add_backward(backend, dy, None if bare else bias_dtype, partitions=PARTITIONS, noise=noise)
    exact, own = dy.double() * factors, dy * factors.to(dtype)
    assert set(back) == ({"dx"} if noise.probability > 0 else set()) | (set() if bare else {"dbias"})
    if "dx" in back:
        check("dx", back["dx"], exact, own)
        assert torch.equal(cpu(back["dx"]) != 0, (factors != 0) & (dy != 0))
    if "dbias" in back:
        check("dbias", back["dbias"], exact.sum(0), own.sum(0).to(bias_dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_dropout(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _check(backend, shape, (dtype, dtype), NOISE, bare=False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_without_dropout_or_bias(backend: KernelBackend, dtype: torch.dtype) -> None:
    for shape in ((70, 31), (70, 264)):
        _check(backend, shape, (dtype, torch.float32), QUIET, bare=False)
        _check(backend, shape, (dtype, torch.float32), QUIET, bare=True)
        _check(backend, shape, (dtype, torch.float32), NOISE, bare=True)


def test_what_is_dropped_is_not_read_into_the_sum(backend: KernelBackend) -> None:
    """Probabilities near 0 and 1: the share that is kept, and its scale."""
    x, zero = torch.ones(64, 24), torch.zeros(64, 24)
    for probability in (1e-9, 0.5, 0.999):
        y = cpu(bias_dropout_add_forward(backend, x, None, zero, noise=Noise(probability, 5))["y"])
        check("y", y, dropout_factors(x.shape, probability, 5), y)


def test_large_seed_and_index(backend: KernelBackend) -> None:
    """Every bit of the seed counts, and rows behind the first block of rows have their own noise."""
    x, zero = torch.ones(40, 8), torch.zeros(40, 8)
    for seed in (0, 1, 2**31, 2**32, 2**63 - 1, -1, -(2**63)):
        y = cpu(bias_dropout_add_forward(backend, x, None, zero, noise=Noise(0.5, seed))["y"])
        assert torch.equal(y, dropout_factors(x.shape, 0.5, seed).float()), seed
