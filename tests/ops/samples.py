"""Inputs of every operation, and the operation on them, fused or reference."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_ext.ops.add_layer_norm import add_layer_norm
from megatron_ext.ops.bias_dropout_add import bias_dropout_add
from megatron_ext.ops.bias_gelu import bias_gelu
from megatron_ext.ops.cross_entropy import VocabSlice, cross_entropy
from megatron_ext.ops.kernels import Kernels
from megatron_ext.ops.layer_norm import layer_norm
from megatron_ext.ops.softmax import causal_softmax


@dataclass(frozen=True)
class Sample:
    """An operation with settings, and the shapes of what it takes and what gets a gradient."""

    name: str
    shapes: tuple[tuple[int, ...], ...]
    call: Callable[..., torch.Tensor]
    """(inputs..., kernels=) -> result."""

    def inputs(self, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> list[torch.Tensor]:
        """Random numbers of the shapes, which require gradients."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in self.shapes]
        return [tensor.to(dtype).requires_grad_() for tensor in drawn]

    def run(self, inputs: list[torch.Tensor], kernels: Kernels, *, seed: int = 1) -> tuple[torch.Tensor, ...]:
        """Result and gradients under a fixed upstream gradient."""
        torch.manual_seed(seed)
        result = self.call(*inputs, kernels=kernels)
        upstream = torch.linspace(-1, 1, result.numel(), dtype=result.dtype).view(result.shape)
        return (result, *torch.autograd.grad(result, inputs, upstream))


def _sum_and_norm(*arguments: torch.Tensor, dropout: float, kernels: Kernels) -> torch.Tensor:
    """Both results of add_layer_norm in one tensor; (x, x_bias or nothing, residual, weight, bias)."""
    x, *x_bias, residual, weight, bias = arguments
    norm = weight, bias, 1e-5
    pair = add_layer_norm(x, x_bias[0] if x_bias else None, residual, norm, dropout=dropout, kernels=kernels)
    return torch.stack(pair)


def _normed_alone(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, kernels: Kernels
) -> torch.Tensor:
    return add_layer_norm(x, None, residual, (weight, bias, 1e-5), dropout=0.0, kernels=kernels)[1]


def _summed_alone(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, kernels: Kernels
) -> torch.Tensor:
    total = add_layer_norm(x, None, residual, (weight, bias, 1e-5), dropout=0.0, kernels=kernels)[0]
    return total + 0.0 * (weight.sum() + bias.sum())


_X, _ROW, _SCORES = (3, 5, 24), (24,), (2, 3, 5, 11)
_LABELS = torch.arange(15).view(3, 5)

SAMPLES = [
    Sample("layer_norm", (_X, _ROW, _ROW), lambda *t, kernels: layer_norm(*t, eps=1e-5, kernels=kernels)),
    Sample(
        "add_layer_norm",
        (_X, _ROW, _X, _ROW, _ROW),
        lambda *t, kernels: _sum_and_norm(*t, dropout=0.3, kernels=kernels),
    ),
    Sample(
        "add_layer_norm, no bias, no dropout",
        (_X, _X, _ROW, _ROW),
        lambda *t, kernels: _sum_and_norm(*t, dropout=0.0, kernels=kernels),
    ),
    Sample("add_layer_norm, only the norm read", (_X, _X, _ROW, _ROW), _normed_alone),
    Sample("add_layer_norm, only the sum read", (_X, _X, _ROW, _ROW), _summed_alone),
    Sample(
        "bias_dropout_add",
        (_X, _ROW, _X),
        lambda x, b, r, kernels: bias_dropout_add(x, b, r, dropout=0.3, kernels=kernels),
    ),
    Sample(
        "bias_dropout_add, no dropout",
        (_X, _ROW, _X),
        lambda x, b, r, kernels: bias_dropout_add(x, b, r, dropout=0.0, kernels=kernels),
    ),
    Sample(
        "bias_dropout_add, no bias, no dropout",
        (_X, _X),
        lambda x, r, kernels: bias_dropout_add(x, None, r, dropout=0.0, kernels=kernels),
    ),
    Sample("bias_gelu", (_X, _ROW), lambda x, b, kernels: bias_gelu(x, b, exact=False, kernels=kernels)),
    Sample("bias_gelu, exact, no bias", (_X,), lambda x, kernels: bias_gelu(x, None, exact=True, kernels=kernels)),
    Sample("causal_softmax", (_SCORES,), lambda s, kernels: causal_softmax(s, scale=0.4, dropout=0.3, kernels=kernels)),
    Sample(
        "causal_softmax, no dropout",
        ((3, 7, 7),),
        lambda s, kernels: causal_softmax(s, scale=0.4, dropout=0.0, kernels=kernels),
    ),
    Sample(
        "cross_entropy",
        (_X,),
        lambda x, kernels: cross_entropy(x * 1.0, _LABELS, VocabSlice(0, 20), kernels=kernels),
    ),
]
