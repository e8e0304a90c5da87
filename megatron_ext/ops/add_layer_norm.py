"""What stands between two sublayers of a pre-LayerNorm transformer, as one operation: bias, dropout, residual, norm."""

from typing import Any

import torch

from megatron_ext.ops import bias_dropout_add, layer_norm
from megatron_ext.ops.dropout import seed_for
from megatron_ext.ops.kernels import Kernels, is_fused


def add_layer_norm(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float],
    *,
    dropout: float,
    kernels: Kernels,
) -> tuple[torch.Tensor, torch.Tensor]:
    """sum = residual + dropout(x + x_bias), and the LayerNorm of it.

    Args:
        x: [..., cols], what a sublayer gave without its bias.
        x_bias: [cols], or None.
        residual: Of the shape and dtype of ``x``.
        norm: Weight and bias [cols] of the LayerNorm, of x's dtype or float32, as is ``x_bias``; and its epsilon.
        dropout: Probability with which an element of x + x_bias is dropped; 0 where the model does not train.
        kernels: Which ones compute. Both draw the same mask.

    Returns:
        The sum, and its norm.
    """
    weight, bias, eps = norm
    seed = seed_for(dropout, x.device)
    if not is_fused(kernels, x):
        return reference(x, x_bias, residual, norm, dropout=dropout, seed=seed)
    total, y = _Fused.apply(x, x_bias, residual, weight, bias, (eps, dropout, seed))  # type: ignore[no-untyped-call]
    return total, y


def reference(
    x: torch.Tensor,
    x_bias: torch.Tensor | None,
    residual: torch.Tensor,
    norm: tuple[torch.Tensor, torch.Tensor, float],
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same in plain PyTorch."""
    total = bias_dropout_add.reference(x, x_bias, residual, dropout=dropout, seed=seed)
    return total, layer_norm.reference(total, norm[0], norm[1], eps=norm[2])


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: torch.Tensor,
        x_bias: torch.Tensor | None,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        settings: tuple[float, float, torch.Tensor | None],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        eps, dropout, seed = settings
        total, y, mean, rstd = torch.ops.megatron_ext.add_layer_norm_forward.default(
            x.contiguous(), x_bias, residual.contiguous(), weight, bias, dropout, seed, eps
        )
        ctx.dropout, ctx.has_x_bias = dropout, x_bias is not None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(total, weight, mean, rstd, seed)
        return total, y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        total, weight, mean, rstd, seed = ctx.saved_tensors
        dsum, dy = (None if grad is None else grad.contiguous() for grad in grad_outputs)
        if dy is None:
            dy = torch.zeros_like(total)
        dresidual, dx, dweight, dbias, dx_bias = torch.ops.megatron_ext.add_layer_norm_backward.default(
            dy, dsum, total, weight, mean, rstd, ctx.has_x_bias, ctx.dropout, seed
        )
        dx = dx if ctx.dropout > 0 else dresidual
        return dx, dx_bias if ctx.has_x_bias else None, dresidual, dweight, dbias, None


def _fake_forward(x: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), *statistics


def _fake_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    dy, _, _, weight, _, _, has_x_bias, dropout, _ = arguments
    dx = torch.empty_like(dy) if dropout > 0 else dy.new_empty(0)
    dx_bias = torch.empty_like(weight) if has_x_bias else weight.new_empty(0)
    return torch.empty_like(dy), dx, torch.empty_like(weight), torch.empty_like(weight), dx_bias


FAKES = {"add_layer_norm_forward": _fake_forward, "add_layer_norm_backward": _fake_backward}
