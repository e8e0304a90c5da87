"""The kernels as Python functions: inputs are copied to the backend, outputs made of NaN bytes, results handed back.

Activations are [rows, cols] or, in attention, [batch, sq, sk]; arguments and results are those of csrc/common/abi.h.
"""

from dataclasses import dataclass

import torch

from tests.kernels.backends import KernelBackend
from tests.kernels.interface import DTYPES

SEED_TYPE = torch.int64


@dataclass(frozen=True)
class Noise:
    """Dropout: its probability, and the seed of its noise."""

    probability: float = 0.0
    seed: int = 0

    def on(self, backend: KernelBackend) -> torch.Tensor | None:
        """The seed in the backend's memory; None where nothing is dropped."""
        return backend.tensor(torch.tensor([self.seed], dtype=SEED_TYPE)) if self.probability > 0 else None


QUIET = Noise()


def _maybe(backend: KernelBackend, value: torch.Tensor | None) -> torch.Tensor | None:
    return None if value is None else backend.tensor(value)


def layer_norm_forward(
    backend: KernelBackend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> dict[str, torch.Tensor]:
    """y, mean, rstd."""
    rows, cols = x.shape
    dtypes = DTYPES[x.dtype], DTYPES[weight.dtype]
    y = backend.empty(rows, cols, dtype=x.dtype)
    mean, rstd = (backend.empty(rows, dtype=torch.float32) for _ in range(2))
    inputs = [backend.tensor(each) for each in (x, weight, bias)]
    backend.call("layer_norm_forward", *dtypes, *inputs, y, mean, rstd, rows, cols, eps)
    return {"y": y, "mean": mean, "rstd": rstd}


def layer_norm_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    statistics: tuple[torch.Tensor, torch.Tensor],
    partitions: int,
) -> dict[str, torch.Tensor]:
    """dx, dweight, dbias; ``statistics``: mean and rstd."""
    rows, cols = dy.shape
    dtypes = DTYPES[dy.dtype], DTYPES[weight.dtype]
    dx = backend.empty(rows, cols, dtype=dy.dtype)
    dweight, dbias = (backend.empty(cols, dtype=weight.dtype) for _ in range(2))
    workspace = backend.empty(2, partitions, cols, dtype=torch.float32)
    inputs = [backend.tensor(each) for each in (dy, x, weight, *statistics)]
    backend.call("layer_norm_backward", *dtypes, *inputs, dx, dweight, dbias, workspace, partitions, rows, cols)
    return {"dx": dx, "dweight": dweight, "dbias": dbias}


def add_layer_norm_forward(
    backend: KernelBackend,
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor,
    affine: tuple[torch.Tensor, torch.Tensor],
    *,
    noise: Noise = QUIET,
    eps: float = 1e-5,
) -> dict[str, torch.Tensor]:
    """sum, y, mean, rstd; ``affine``: weight and bias."""
    rows, cols = x.shape
    dtypes = DTYPES[x.dtype], DTYPES[affine[0].dtype]
    total, y = (backend.empty(rows, cols, dtype=x.dtype) for _ in range(2))
    mean, rstd = (backend.empty(rows, dtype=torch.float32) for _ in range(2))
    inputs = [_maybe(backend, each) for each in (x, x_bias, residual, *affine)]
    outputs = (total, y, mean, rstd)
    dropout = noise.probability, noise.on(backend)
    backend.call("add_layer_norm_forward", *dtypes, *inputs, *outputs, *dropout, rows, cols, eps)
    return {"sum": total, "y": y, "mean": mean, "rstd": rstd}


def add_layer_norm_backward(
    backend: KernelBackend,
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    *,
    with_x_bias: bool,
    partitions: int,
    noise: Noise = QUIET,
) -> dict[str, torch.Tensor]:
    """dresidual, dx (with dropout), dweight, dbias, dx_bias (``with_x_bias``).

    ``gradients``: dy and dsum; ``saved``: sum, mean and rstd.
    """
    (dy, dsum), (total, *statistics) = gradients, saved
    rows, cols = dy.shape
    dtypes = DTYPES[dy.dtype], DTYPES[weight.dtype]
    dresidual = backend.empty(rows, cols, dtype=dy.dtype)
    dx = backend.empty(rows, cols, dtype=dy.dtype) if noise.probability > 0 else None
    dweight, dbias = (backend.empty(cols, dtype=weight.dtype) for _ in range(2))
    dx_bias = backend.empty(cols, dtype=weight.dtype) if with_x_bias else None
    workspace = backend.empty(3, partitions, cols, dtype=torch.float32)
    inputs = [_maybe(backend, each) for each in (dy, dsum, total, weight, *statistics)]
    outputs = (dresidual, dx, dweight, dbias, dx_bias, workspace, partitions)
    dropout = noise.probability, noise.on(backend)
    backend.call("add_layer_norm_backward", *dtypes, *inputs, *outputs, *dropout, rows, cols)
    results = {"dresidual": dresidual, "dx": dx, "dweight": dweight, "dbias": dbias, "dx_bias": dx_bias}
    return {name: value for name, value in results.items() if value is not None}


def causal_softmax_forward(
    backend: KernelBackend, scores: torch.Tensor, scale: float, *, noise: Noise = QUIET
) -> dict[str, torch.Tensor]:
    """probs and, with dropout, dropped."""
    probs = backend.empty(*scores.shape, dtype=scores.dtype)
    dropped = backend.empty(*scores.shape, dtype=scores.dtype) if noise.probability > 0 else None
    dropout = noise.probability, noise.on(backend)
    where = (probs, dropped, scale)
    backend.call(
        "causal_softmax_forward", DTYPES[scores.dtype], backend.tensor(scores), *where, *dropout, *scores.shape
    )
    return {"probs": probs} if dropped is None else {"probs": probs, "dropped": dropped}


def causal_softmax_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    probs: torch.Tensor,
    scale: float,
    *,
    noise: Noise = QUIET,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """dscores, in the memory of dy where ``in_place``."""
    upstream = backend.tensor(dy)
    dscores = upstream if in_place else backend.empty(*dy.shape, dtype=dy.dtype)
    dropout = noise.probability, noise.on(backend)
    where = (upstream, backend.tensor(probs), dscores, scale)
    backend.call("causal_softmax_backward", DTYPES[dy.dtype], *where, *dropout, *dy.shape)
    return {"dscores": dscores}


def bias_gelu_forward(
    backend: KernelBackend, x: torch.Tensor, bias: torch.Tensor | None, *, exact: bool
) -> dict[str, torch.Tensor]:
    y = backend.empty(*x.shape, dtype=x.dtype)
    dtypes = DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
    backend.call("bias_gelu_forward", *dtypes, backend.tensor(x), _maybe(backend, bias), y, int(exact), *x.shape)
    return {"y": y}


def bias_gelu_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    exact: bool,
    partitions: int,
    in_place: bool = False,
) -> dict[str, torch.Tensor]:
    """dx, in the memory of dy where ``in_place``, and dbias (where there is a bias)."""
    upstream = backend.tensor(dy)
    dx = upstream if in_place else backend.empty(*dy.shape, dtype=dy.dtype)
    dtypes = DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
    dbias = None if bias is None else backend.empty(*bias.shape, dtype=bias.dtype)
    workspace = None if bias is None else backend.empty(partitions, *bias.shape, dtype=torch.float32)
    inputs = (upstream, backend.tensor(x), _maybe(backend, bias))
    backend.call("bias_gelu_backward", *dtypes, *inputs, dx, dbias, workspace, partitions, int(exact), *x.shape)
    return {"dx": dx} if dbias is None else {"dx": dx, "dbias": dbias}


def bias_dropout_add_forward(
    backend: KernelBackend,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    noise: Noise = QUIET,
) -> dict[str, torch.Tensor]:
    y = backend.empty(*x.shape, dtype=x.dtype)
    dtypes = DTYPES[x.dtype], DTYPES[x.dtype if bias is None else bias.dtype]
    inputs = [_maybe(backend, each) for each in (x, bias, residual)]
    backend.call("bias_dropout_add_forward", *dtypes, *inputs, y, noise.probability, noise.on(backend), *x.shape)
    return {"y": y}


def bias_dropout_add_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    bias_dtype: torch.dtype | None,
    *,
    partitions: int,
    noise: Noise = QUIET,
) -> dict[str, torch.Tensor]:
    """dx (with dropout) and dbias (where there is a bias, of ``bias_dtype``)."""
    cols = dy.shape[1]
    dx = backend.empty(*dy.shape, dtype=dy.dtype) if noise.probability > 0 else None
    dbias = None if bias_dtype is None else backend.empty(cols, dtype=bias_dtype)
    workspace = None if bias_dtype is None else backend.empty(partitions, cols, dtype=torch.float32)
    dtypes = DTYPES[dy.dtype], DTYPES[bias_dtype or dy.dtype]
    outputs = (dx, dbias, workspace, partitions)
    dropout = noise.probability, noise.on(backend)
    backend.call("bias_dropout_add_backward", *dtypes, backend.tensor(dy), *outputs, *dropout, *dy.shape)
    return {name: value for name, value in (("dx", dx), ("dbias", dbias)) if value is not None}


def cross_entropy_forward(
    backend: KernelBackend, logits: torch.Tensor, labels: torch.Tensor, *, first: int, real: int
) -> dict[str, torch.Tensor]:
    """maximum, total, target of a slice of ``real`` ids from ``first``."""
    rows, cols = logits.shape
    results = {name: backend.empty(rows, dtype=torch.float32) for name in ("maximum", "total", "target")}
    inputs = (DTYPES[logits.dtype], backend.tensor(logits), backend.tensor(labels))
    backend.call("cross_entropy_forward", *inputs, *results.values(), first, real, rows, cols)
    return results


def cross_entropy_backward(
    backend: KernelBackend,
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    first: int,
    real: int,
) -> dict[str, torch.Tensor]:
    """dlogits, from a copy of ``logits``; ``statistics``: maximum, total, grad."""
    changed = backend.tensor(logits)
    inputs = [backend.tensor(each) for each in (labels, *statistics)]
    backend.call("cross_entropy_backward", DTYPES[logits.dtype], changed, *inputs, first, real, *logits.shape)
    return {"dlogits": changed}


def adam_variance(
    backend: KernelBackend, v: torch.Tensor, *, partitions: int, skipped: int = 0
) -> dict[str, torch.Tensor]:
    """result, of v without its first ``skipped`` elements, which then begins anywhere in memory."""
    result = backend.empty(2, dtype=torch.float64)
    workspace = backend.empty(2, partitions, dtype=torch.float64)
    values = backend.tensor(v)[skipped:]
    backend.call("adam_variance", DTYPES[v.dtype], values, result, workspace, partitions, values.numel())
    return {"result": result}
