"""LayerNorm after the residual add, with bias and dropout before it, of every backend against float64."""

import pytest
import torch
from torch.nn import functional

from tests.kernels.accuracy import BF16, F16, F32, FLOATS, check, cpu, dropout_factors, normal, same_bits
from tests.kernels.backends import KernelBackend
from tests.kernels.calls import (
    QUIET,
    Noise,
    add_layer_norm_backward,
    add_layer_norm_forward,
    layer_norm_backward,
    layer_norm_forward,
)
from tests.kernels.test_layer_norm import gradients as layer_norm_gradients

EPS = 1e-5
PARTITIONS = 2
NOISE = Noise(probability=0.3, seed=987654321987)
# (rows, cols), as in test_layer_norm.
SHAPES = [(9, 7), (9, 18), (1100, 8), (21, 768), (17, 1024), (9, 1025), (5, 8200), (2, 16384)]

EVERYWHERE = {
    "test_with_bias_and_dropout": [
        ((9, 7), F16), ((1100, 8), F32), ((17, 1024), BF16), ((9, 1025), F32), ((5, 8200), F16),
    ],
}  # fmt: skip


def _inputs(shape: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype) -> dict[str, torch.Tensor]:
    cols = shape[1:]
    values = {name: normal(shape, dtype, seed=seed) for seed, name in enumerate(("x", "residual", "dy", "dsum"))}
    return values | {
        "x_bias": normal(cols, weight_dtype, seed=5),
        "weight": normal(cols, weight_dtype, seed=6, scale=0.2, mean=1),
        "bias": normal(cols, weight_dtype, seed=7),
    }


def _check(
    backend: KernelBackend, shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], noise: Noise, *, bare: bool
) -> None:
    """Both directions; ``bare``: without x_bias and dsum."""
    given = _inputs(shape, *dtypes)
    x_bias = None if bare else given["x_bias"]
    _check_forward(backend, given, x_bias, noise)
    _check_backward(backend, given, None if bare else given["dsum"], noise)


def _check_forward(
    backend: KernelBackend, given: dict[str, torch.Tensor], x_bias: torch.Tensor | None, noise: Noise
) -> None:
    x, residual, dtype = given["x"], given["residual"], given["x"].dtype
    affine = given["weight"], given["bias"]
    got = add_layer_norm_forward(backend, x, x_bias, residual, affine, noise=noise, eps=EPS)
    factors = dropout_factors(x.shape, noise.probability, noise.seed)
    biased = x.double() if x_bias is None else x.double() + x_bias.double()
    own = x if x_bias is None else x + x_bias.to(dtype)
    check("sum", got["sum"], residual.double() + biased * factors, residual + own * factors.to(dtype))
    # What comes after is a LayerNorm of the sum as it was stored.
    alone = layer_norm_forward(backend, cpu(got["sum"]), *affine, EPS)
    total = cpu(got["sum"])
    cols = x.shape[1:]
    exact = functional.layer_norm(total.double(), cols, affine[0].double(), affine[1].double(), EPS)
    check("y", got["y"], exact, functional.layer_norm(total, cols, affine[0].to(dtype), affine[1].to(dtype), EPS))
    for name in ("mean", "rstd"):
        assert torch.allclose(cpu(got[name]), cpu(alone[name]), rtol=1e-6, atol=1e-7), name


def _check_backward(
    backend: KernelBackend, given: dict[str, torch.Tensor], dsum: torch.Tensor | None, noise: Noise
) -> None:
    dy, weight, total, dtype = given["dy"], given["weight"], given["x"], given["x"].dtype
    mean = total.double().mean(-1).float()
    rstd = (total.double().var(-1, unbiased=False) + EPS).rsqrt().float()
    got = add_layer_norm_backward(
        backend,
        (dy, dsum),
        (total, mean, rstd),
        weight,
        with_x_bias=dsum is not None,
        partitions=PARTITIONS,
        noise=noise,
    )
    factors = dropout_factors(dy.shape, noise.probability, noise.seed)
    exact = _gradients(dsum, (dy, total, weight, mean, rstd), factors, torch.float64)
    own = _gradients(dsum, (dy, total, weight, mean, rstd), factors, dtype)
    for name, value in got.items():
        row = name in {"dresidual", "dx"}
        terms = (rstd.unsqueeze(-1) * dy.float() * weight.float()).abs().amax(-1, True) if row else None
        check(name, value, exact[name], own[name].to(value.dtype), terms=terms)


def _gradients(
    dsum: torch.Tensor | None, inputs: tuple[torch.Tensor, ...], factors: torch.Tensor, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    dy, total, weight, mean, rstd = (each.to(dtype) for each in inputs)
    norm = layer_norm_gradients(dy, (total - mean.unsqueeze(-1)) * rstd.unsqueeze(-1), weight, rstd)
    d = norm["dx"] if dsum is None else norm["dx"] + dsum.to(dtype)
    dropped = d * factors.to(dtype)
    norm |= {"dresidual": d, "dx": dropped, "dx_bias": dropped.sum(0)}
    return norm


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_bias_and_dropout(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _check(backend, shape, (dtype, dtype), NOISE, bare=False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (21, 768)], ids=str)
def test_plain_add(backend: KernelBackend, shape: tuple[int, int], dtype: torch.dtype) -> None:
    _check(backend, shape, (dtype, torch.float32), QUIET, bare=True)


@pytest.mark.parametrize("shape", [(9, 7), (21, 768)], ids=str)
def test_bias_without_dropout(backend: KernelBackend, shape: tuple[int, int]) -> None:
    _check(backend, shape, (torch.float16, torch.float32), QUIET, bare=False)


def test_without_what_is_added_it_is_layer_norm(backend: KernelBackend) -> None:
    """The same bits as the op alone, so that a model may change between them."""
    for shape in ((9, 7), (21, 768)):
        given = _inputs(shape, torch.float32, torch.float32)
        x, dy, weight = given["x"], given["dy"], given["weight"]
        forward = add_layer_norm_forward(backend, x, None, torch.zeros(shape), (weight, given["bias"]))
        alone = layer_norm_forward(backend, x, weight, given["bias"])
        same_bits("y", forward["y"], alone["y"])
        mean, rstd = cpu(alone["mean"]), cpu(alone["rstd"])
        got = add_layer_norm_backward(
            backend, (dy, None), (x, mean, rstd), weight, with_x_bias=False, partitions=PARTITIONS
        )
        reference = layer_norm_backward(backend, dy, x, weight, statistics=(mean, rstd), partitions=PARTITIONS)
        check("dx", got["dresidual"], cpu(reference["dx"]).double(), cpu(reference["dx"]))
        check("dweight", got["dweight"], cpu(reference["dweight"]).double(), cpu(reference["dweight"]))
