"""LayerNorm of every backend against float64: output, statistics and gradients."""

import pytest
import torch
from torch.nn import functional

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, normal
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import layer_norm_backward, layer_norm_forward

EPS = 1e-5
# (rows, cols). With two partitions, rows are more than what the blocks of a backward pass take at once, twice over, so
# that whatever is used again for the next row shows; widths are those of every path: a few lanes, a warp, warps,
# registers and shared memory for column sums, and what vectors do not fit, odd and even.
SHAPES = [
    (5, 1), (9, 7), (1100, 8), (300, 16), (9, 18), (9, 31), (45, 264), (21, 768), (9, 1023), (17, 1024),
    (9, 1025),
]  # fmt: skip
WIDE = [(7, 6000), (5, 8200), (3, 16384), (3, 16392)]
PARTITIONS = 2

_POINTS = [
    ((5, 1), F32), ((1100, 8), F16), ((9, 31), BF16), ((21, 768), F32), ((17, 1024), F16), ((5, 8200), BF16),
    ((3, 16384), F32), ((3, 16392), F16),
]  # fmt: skip
EVERYWHERE = {"test_forward": _POINTS, "test_backward": _POINTS}


def _inputs(shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, weight, bias, dy."""
    weight = normal(shape[1:], weight_dtype, seed=2, scale=0.2, mean=1)
    bias = normal(shape[1:], weight_dtype, seed=3)
    return normal(shape, dtype, seed=1, scale=3, mean=1), weight, bias, normal(shape, dtype, seed=4)


def _forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> dict[str, torch.Tensor]:
    """torch's own, in the dtype of x; statistics those of float32 and above."""
    wide = x if x.dtype == torch.float64 else x.float()
    y = functional.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
    _, mean, rstd = torch.native_layer_norm(wide, x.shape[-1:], None, None, eps)
    return {"y": y, "mean": mean.squeeze(-1), "rstd": rstd.squeeze(-1)}


def _check_forward(backend: KernelBackend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> None:
    got = layer_norm_forward(backend, x, weight, bias, EPS)
    exact = _forward(x.double(), weight.double(), bias.double(), EPS)
    own = _forward(x, weight, bias, EPS)
    assert got["mean"].dtype == got["rstd"].dtype == torch.float32
    # A mean may be near 0 where the values are not: its error is one of theirs.
    spread = x.double().abs().amax(-1)
    check("mean over the values", got["mean"] / spread.float().to(got["mean"].device), exact["mean"] / spread,
          (own["mean"] / spread).float())  # fmt: skip
    check("rstd", got["rstd"].unsqueeze(-1), exact["rstd"].unsqueeze(-1), own["rstd"].unsqueeze(-1))
    check("y", got["y"], exact["y"], own["y"])


def gradients(
    dy: torch.Tensor, normalized: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The formulas in the dtype of the arguments."""
    g = dy * weight
    dx = rstd.unsqueeze(-1) * (g - g.mean(-1, True) - normalized * (g * normalized).mean(-1, True))
    return {"dx": dx, "dweight": (dy * normalized).sum(0), "dbias": dy.sum(0)}


def _check_backward(backend: KernelBackend, inputs: tuple[torch.Tensor, ...], *, partitions: int = PARTITIONS) -> None:
    x, weight, bias, dy = inputs
    statistics = _forward(x.double(), weight.double(), bias.double(), EPS)
    mean, rstd = statistics["mean"].float(), statistics["rstd"].float()
    got = layer_norm_backward(backend, dy, x, weight, statistics=(mean, rstd), partitions=partitions)
    exact_normalized = (x.double() - mean.double().unsqueeze(-1)) * rstd.double().unsqueeze(-1)
    own_normalized = ((x.float() - mean.unsqueeze(-1)) * rstd.unsqueeze(-1)).to(x.dtype)
    exact = gradients(dy.double(), exact_normalized, weight.double(), rstd.double())
    own = gradients(dy, own_normalized, weight.to(x.dtype), rstd.to(x.dtype))
    for name, value in got.items():
        terms = (rstd.unsqueeze(-1) * dy.float() * weight.float()).abs().amax(-1, True) if name == "dx" else None
        check(name, value, exact[name], own[name].to(value.dtype), terms=terms)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_forward(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight, bias, _ = _inputs(shape, dtype, dtype)
    _check_forward(backend, x, weight, bias)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *WIDE], ids=str)
def test_backward(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _check_backward(backend, _inputs(shape, dtype, dtype))


@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@pytest.mark.parametrize("shape", [(9, 31), (21, 768)], ids=str)
def test_weights_in_float32(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    inputs = _inputs(shape, dtype, torch.float32)
    _check_forward(backend, *inputs[:3])
    _check_backward(backend, inputs)


@pytest.mark.parametrize("cols", [31, 768])
def test_large_mean(backend: KernelBackend, cols: int) -> None:
    for dtype, mean in ((torch.float32, 1e4), (torch.float16, 1e3), (torch.bfloat16, 300.0)):
        _, weight, bias, _ = _inputs((3, cols), dtype, dtype)
        _check_forward(backend, normal((3, cols), dtype, seed=5, mean=mean), weight, bias)


@pytest.mark.parametrize("cols", [31, 768])
def test_values_whose_squares_overflow(backend: KernelBackend, cols: int) -> None:
    for dtype, scale in ((torch.float16, 2e4), (torch.bfloat16, 1e15), (torch.float32, 1e15)):
        _, weight, bias, _ = _inputs((3, cols), dtype, dtype)
        x = normal((3, cols), torch.float64, seed=6, scale=scale).clamp(-3 * scale, 3 * scale).to(dtype)
        _check_forward(backend, x, weight, bias)


@pytest.mark.parametrize("cols", [1, 31, 768])
def test_rows_of_one_value(backend: KernelBackend, cols: int) -> None:
    _, weight, bias, _ = _inputs((2, cols), torch.float32, torch.float32)
    x = torch.tensor([[0.1], [-1234.5]]).expand(2, cols).contiguous()
    got = layer_norm_forward(backend, x, weight, bias, EPS)
    assert (cpu(got["y"]) - bias).abs().max() < 1e-2
    assert torch.allclose(cpu(got["mean"]), x[:, 0], rtol=1e-6)


@pytest.mark.parametrize("cols", [16, 31, 1024])
def test_what_is_not_finite_stays_in_its_row(backend: KernelBackend, cols: int) -> None:
    x, weight, bias, _ = _inputs((6, cols), torch.float32, torch.float32)
    x[1, cols // 2], x[4, 0] = float("nan"), float("inf")
    y = cpu(layer_norm_forward(backend, x, weight, bias, EPS)["y"])
    assert y[[1, 4]].isnan().all()
    check("rows beside", y[[0, 2, 3, 5]], _forward(x.double(), weight.double(), bias.double(), EPS)["y"][[0, 2, 3, 5]],
          _forward(x, weight, bias, EPS)["y"][[0, 2, 3, 5]])  # fmt: skip
