"""The kernels as Python functions: inputs are copied to the backend, outputs made of NaN bytes, results handed back.

Activations are [rows, cols] or, in attention, [batch, sq, sk]; arguments and results are those of csrc/common/abi.h.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from tests.kernels.backends import KernelBackend
from tests.kernels.interface import DTYPES, Argument

Results = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Noise:
    """Dropout: its probability, and the seed of its noise."""

    probability: float = 0.0
    seed: int = 0

    def on(self, backend: KernelBackend) -> tuple[float, torch.Tensor | None]:
        """The probability, and the seed in the backend's memory; None where nothing is dropped."""
        seed = backend.tensor(torch.tensor([self.seed])) if self.probability > 0 else None
        return self.probability, seed


QUIET = Noise()


def _copies(backend: KernelBackend, *values: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if value is None else backend.tensor(value) for value in values]


def _empty(backend: KernelBackend, dtype: torch.dtype, **shapes: tuple[int, ...]) -> Results:
    return {name: backend.empty(*shape, dtype=dtype) for name, shape in shapes.items()}


def _call(
    backend: KernelBackend,
    function: str,
    dtypes: Iterable[torch.dtype],
    inputs: Iterable[Argument],
    outputs: Mapping[str, torch.Tensor | None],
    *rest: Argument,
) -> Results:
    """The outputs; those that are None are not asked for."""
    backend.call(function, *(DTYPES[dtype] for dtype in dtypes), *inputs, *outputs.values(), *rest)
    return {name: value for name, value in outputs.items() if value is not None}


def layer_norm_forward(
    backend: KernelBackend, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> Results:
    """y, mean, rstd."""
    rows, cols = x.shape
    outputs = _empty(backend, x.dtype, y=(rows, cols)) | _empty(backend, torch.float32, mean=(rows,), rstd=(rows,))
    inputs = _copies(backend, x, weight, bias)
    return _call(backend, "layer_norm_forward", (x.dtype, weight.dtype), inputs, outputs, rows, cols, eps)


def layer_norm_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    statistics: tuple[torch.Tensor, torch.Tensor],
    partitions: int,
) -> Results:
    """dx, dweight, dbias; ``statistics``: mean and rstd."""
    rows, cols = dy.shape
    outputs = _empty(backend, dy.dtype, dx=(rows, cols)) | _empty(backend, weight.dtype, dweight=(cols,), dbias=(cols,))
    workspace = backend.empty(2, partitions, cols, dtype=torch.float32)
    dtypes, inputs = (dy.dtype, weight.dtype), _copies(backend, dy, x, weight, *statistics)
    return _call(backend, "layer_norm_backward", dtypes, inputs, outputs, workspace, partitions, rows, cols)


def add_layer_norm_forward(
    backend: KernelBackend,
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor,
    affine: tuple[torch.Tensor, torch.Tensor],
    *,
    noise: Noise = QUIET,
    eps: float = 1e-5,
) -> Results:
    """sum, y, mean, rstd; ``affine``: weight and bias."""
    rows, cols = shape = tuple(x.shape)
    outputs = _empty(backend, x.dtype, sum=shape, y=shape) | _empty(backend, torch.float32, mean=(rows,), rstd=(rows,))
    dtypes, inputs = (x.dtype, affine[0].dtype), _copies(backend, x, x_bias, residual, *affine)
    return _call(backend, "add_layer_norm_forward", dtypes, inputs, outputs, *noise.on(backend), rows, cols, eps)


def add_layer_norm_backward(
    backend: KernelBackend,
    gradients: tuple[torch.Tensor, torch.Tensor | None],
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    weight: torch.Tensor,
    *,
    with_x_bias: bool,
    partitions: int,
    noise: Noise = QUIET,
) -> Results:
    """dresidual, dx (with dropout), dweight, dbias, dx_bias (``with_x_bias``).

    ``gradients``: dy and dsum; ``saved``: sum, mean and rstd.
    """
    (dy, dsum), (total, *statistics) = gradients, saved
    rows, cols = shape = tuple(dy.shape)
    outputs: dict[str, torch.Tensor | None] = {
        "dresidual": backend.empty(*shape, dtype=dy.dtype),
        "dx": backend.empty(*shape, dtype=dy.dtype) if noise.probability > 0 else None,
        **_empty(backend, weight.dtype, dweight=(cols,), dbias=(cols,)),
        "dx_bias": backend.empty(cols, dtype=weight.dtype) if with_x_bias else None,
    }
    workspace = backend.empty(3, partitions, cols, dtype=torch.float32)
    dtypes, inputs = (dy.dtype, weight.dtype), _copies(backend, dy, dsum, total, weight, *statistics)
    rest = (workspace, partitions, *noise.on(backend), rows, cols)
    return _call(backend, "add_layer_norm_backward", dtypes, inputs, outputs, *rest)


def causal_softmax_forward(
    backend: KernelBackend, scores: torch.Tensor, scale: float, *, noise: Noise = QUIET
) -> Results:
    """probs and, with dropout, dropped."""
    dropped = backend.empty(*scores.shape, dtype=scores.dtype) if noise.probability > 0 else None
    outputs = {"probs": backend.empty(*scores.shape, dtype=scores.dtype), "dropped": dropped}
    rest = (scale, *noise.on(backend), *scores.shape)
    return _call(backend, "causal_softmax_forward", (scores.dtype,), _copies(backend, scores), outputs, *rest)


def causal_softmax_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    probs: torch.Tensor,
    scale: float,
    *,
    noise: Noise = QUIET,
    in_place: bool = False,
) -> Results:
    """dscores, in the memory of dy where ``in_place``."""
    upstream = backend.tensor(dy)
    outputs = {"dscores": upstream if in_place else backend.empty(*dy.shape, dtype=dy.dtype)}
    inputs, rest = (upstream, backend.tensor(probs)), (scale, *noise.on(backend), *dy.shape)
    return _call(backend, "causal_softmax_backward", (dy.dtype,), inputs, outputs, *rest)


def bias_gelu_forward(backend: KernelBackend, x: torch.Tensor, bias: torch.Tensor | None, *, exact: bool) -> Results:
    dtypes = (x.dtype, x.dtype if bias is None else bias.dtype)
    outputs = _empty(backend, x.dtype, y=tuple(x.shape))
    return _call(backend, "bias_gelu_forward", dtypes, _copies(backend, x, bias), outputs, int(exact), *x.shape)


def bias_gelu_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    exact: bool,
    partitions: int,
    in_place: bool = False,
) -> Results:
    """dx, in the memory of dy where ``in_place``, and dbias (where there is a bias)."""
    upstream = backend.tensor(dy)
    dtypes = (x.dtype, x.dtype if bias is None else bias.dtype)
    dbias = None if bias is None else backend.empty(*bias.shape, dtype=bias.dtype)
    workspace = None if bias is None else backend.empty(partitions, *bias.shape, dtype=torch.float32)
    outputs = {"dx": upstream if in_place else backend.empty(*dy.shape, dtype=dy.dtype), "dbias": dbias}
    inputs, rest = (upstream, *_copies(backend, x, bias)), (workspace, partitions, int(exact), *x.shape)
    return _call(backend, "bias_gelu_backward", dtypes, inputs, outputs, *rest)


def bias_dropout_add_forward(
    backend: KernelBackend,
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    noise: Noise = QUIET,
) -> Results:
    dtypes = (x.dtype, x.dtype if bias is None else bias.dtype)
    outputs, inputs = _empty(backend, x.dtype, y=tuple(x.shape)), _copies(backend, x, bias, residual)
    return _call(backend, "bias_dropout_add_forward", dtypes, inputs, outputs, *noise.on(backend), *x.shape)


def bias_dropout_add_backward(
    backend: KernelBackend,
    dy: torch.Tensor,
    bias_dtype: torch.dtype | None,
    *,
    partitions: int,
    noise: Noise = QUIET,
) -> Results:
    """dx (with dropout) and dbias (where there is a bias, of ``bias_dtype``)."""
    cols = dy.shape[1]
    outputs = {
        "dx": backend.empty(*dy.shape, dtype=dy.dtype) if noise.probability > 0 else None,
        "dbias": None if bias_dtype is None else backend.empty(cols, dtype=bias_dtype),
    }
    workspace = None if bias_dtype is None else backend.empty(partitions, cols, dtype=torch.float32)
    dtypes, rest = (dy.dtype, bias_dtype or dy.dtype), (workspace, partitions, *noise.on(backend), *dy.shape)
    return _call(backend, "bias_dropout_add_backward", dtypes, _copies(backend, dy), outputs, *rest)


def cross_entropy_forward(
    backend: KernelBackend, logits: torch.Tensor, labels: torch.Tensor, *, first: int, real: int
) -> Results:
    """maximum, total, target of a slice of ``real`` ids from ``first``."""
    rows, cols = logits.shape
    outputs = _empty(backend, torch.float32, maximum=(rows,), total=(rows,), target=(rows,))
    inputs = _copies(backend, logits, labels)
    return _call(backend, "cross_entropy_forward", (logits.dtype,), inputs, outputs, first, real, rows, cols)


def cross_entropy_backward(
    backend: KernelBackend,
    logits: torch.Tensor,
    labels: torch.Tensor,
    statistics: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    *,
    first: int,
    real: int,
) -> Results:
    """dlogits, from a copy of ``logits``; ``statistics``: maximum, total, grad."""
    changed = backend.tensor(logits)
    inputs = _copies(backend, labels, *statistics)
    backend.call("cross_entropy_backward", DTYPES[logits.dtype], changed, *inputs, first, real, *logits.shape)
    return {"dlogits": changed}


def adam_variance(backend: KernelBackend, v: torch.Tensor, *, partitions: int, skipped: int = 0) -> Results:
    """result, of v without its first ``skipped`` elements, which then begins anywhere in memory."""
    outputs = _empty(backend, torch.float64, result=(2,))
    workspace = backend.empty(2, partitions, dtype=torch.float64)
    values = backend.tensor(v)[skipped:]
    return _call(backend, "adam_variance", (v.dtype,), (values,), outputs, workspace, partitions, values.numel())
