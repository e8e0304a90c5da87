"""Bias and GELU of every backend against float64, in both forms."""

import math

import pytest
import torch
from torch.nn import functional

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, normal, same_bits
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import bias_gelu_backward, bias_gelu_forward

PARTITIONS = 2
# (rows, cols): one thread, several tiles across, more rows than two partitions take at once (2 x 8 x 4), vectors and
# single elements.
SHAPES = [(3, 1), (150, 7), (150, 8), (9, 18), (9, 31), (70, 264), (9, 1023), (5, 1024), (9, 1025), (2, 16384)]

EVERYWHERE = {
    "test_both_ways": [((3, 1), F32), ((150, 7), F16), ((150, 8), F32), ((70, 264), BF16)],
}


def _inputs(shape: tuple[int, int], dtype: torch.dtype, bias_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, bias, dy."""
    bias = normal(shape[1:], bias_dtype, seed=2)
    return normal(shape, dtype, seed=1, scale=2), bias, normal(shape, dtype, seed=3)


def _gelu(z: torch.Tensor, exact: bool) -> torch.Tensor:
    return functional.gelu(z, approximate="none" if exact else "tanh")


def _torchs(x: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor, *, exact: bool) -> dict[str, torch.Tensor]:
    """torch's op and its autograd, in the dtype of x."""
    z = (x if bias is None else x + bias.to(x.dtype)).requires_grad_()
    y = _gelu(z, exact)
    (dx,) = torch.autograd.grad(y, z, dy)
    return {"y": y.detach(), "dx": dx, "dbias": dx.sum(0)}


def _check(
    backend: KernelBackend,
    inputs: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    *,
    exact: bool,
    in_place: bool = False,
) -> None:
    x, bias, dy = inputs
    wide = None if bias is None else bias.double()
    true, own = _torchs(x.double(), wide, dy.double(), exact=exact), _torchs(x, bias, dy, exact=exact)
    got = bias_gelu_forward(backend, x, bias, exact=exact)
    got |= bias_gelu_backward(backend, dy, x, bias, exact=exact, partitions=PARTITIONS, in_place=in_place)
    assert ("dbias" in got) == (bias is not None)
    for name, value in got.items():
        # The slope is a sum of terms of about 1 that may cancel.
        check(name, value, true[name], own[name].to(value.dtype), terms=dy.abs() if name == "dx" else None)


@pytest.mark.parametrize("exact", [False, True], ids=["tanh", "erf"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_ways(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype, exact: bool) -> None:
    x, bias, dy = _inputs(shape, dtype, dtype)
    _check(backend, (x, bias, dy), exact=exact, in_place=shape[1] % 2 == 1)


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
def test_bias_in_float32_and_none(backend: KernelBackend, dtype: torch.dtype) -> None:
    for shape in ((70, 31), (70, 264)):
        x, bias, dy = _inputs(shape, dtype, torch.float32)
        _check(backend, (x, bias, dy), exact=False)
        _check(backend, (x, None, dy), exact=True, in_place=True)


@pytest.mark.parametrize("exact", [False, True], ids=["tanh", "erf"])
def test_extreme_values(backend: KernelBackend, exact: bool) -> None:
    """Far out GELU is 0 or its input and its slope 0 or 1, however large the square of the input is."""
    for dtype in FLOATS:
        far = min(torch.finfo(dtype).max, 1e30)
        x = torch.tensor([[0.0, -0.0, far, -far, 60.0, -60.0, 3e-5, -12.0, 12.0, 5.5, -5.5, 1e-3] * 2]).to(dtype)
        dy = torch.ones_like(x)
        y = cpu(bias_gelu_forward(backend, x, None, exact=exact)["y"]).double()
        dx = cpu(bias_gelu_backward(backend, dy, x, None, exact=exact, partitions=1)["dx"]).double()
        z = x.double()
        near = z.abs() < 100
        cumulative = 0.5 * torch.erfc(-z / math.sqrt(2)) if exact else torch.sigmoid(2 * _inner(z))
        assert torch.allclose(y[near], (z * cumulative)[near], rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert torch.equal(y[~near], (z.clamp(min=0)[~near].to(dtype)).double())
        assert torch.equal(dx[~near], (z > 0)[~near].double())
        assert dx.isfinite().all()


def _inner(z: torch.Tensor) -> torch.Tensor:
    return math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def test_nan_stays_nan_where_it_is(backend: KernelBackend) -> None:
    for exact in (False, True):
        x = normal((3, 24), torch.float32, seed=1)
        x[1, 5] = float("nan")
        expected = x.isnan()
        assert torch.equal(cpu(bias_gelu_forward(backend, x, None, exact=exact)["y"]).isnan(), expected)
        got = bias_gelu_backward(backend, torch.ones_like(x), x, None, exact=exact, partitions=1)
        assert torch.equal(cpu(got["dx"]).isnan(), expected)


def test_in_place_gives_the_same_bits(backend: KernelBackend) -> None:
    x, bias, dy = _inputs((70, 264), torch.bfloat16, torch.bfloat16)
    apart = bias_gelu_backward(backend, dy, x, bias, exact=False, partitions=2)
    together = bias_gelu_backward(backend, dy, x, bias, exact=False, partitions=2, in_place=True)
    for name, value in apart.items():
        same_bits(name, together[name], value)
