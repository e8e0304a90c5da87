"""What stands between two sublayers of a pre-LayerNorm transformer, as one operation: bias, dropout, residual, norm."""

from typing import Any

import torch

from megatron_ext.ops import bias_dropout_add, layer_norm
from megatron_ext.ops.dropout import seed_for
from megatron_ext.ops.kernels import Kernels, is_fused

_FORWARD = "megatron_ext::add_layer_norm_forward"
_BACKWARD = "megatron_ext::add_layer_norm_backward"


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
    total, y, _, _ = torch.ops.megatron_ext.add_layer_norm_forward(
        x.contiguous(), x_bias, residual.contiguous(), weight, bias, dropout, seed, eps
    )
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


def register() -> None:
    """Tell torch shapes and derivatives; the library with the schemas is loaded."""
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _backward, setup_context=_keep)


def _fake_forward(x: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)
    return torch.empty_like(x), torch.empty_like(x), *statistics


def _fake_backward(*arguments: Any) -> tuple[torch.Tensor, ...]:
    dy, _, _, weight, _, _, has_x_bias, dropout, _ = arguments
    dx = torch.empty_like(dy) if dropout > 0 else dy.new_empty(0)
    dx_bias = torch.empty_like(weight) if has_x_bias else weight.new_empty(0)
    return torch.empty_like(dy), dx, torch.empty_like(weight), torch.empty_like(weight), dx_bias


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _, x_bias, _, weight, _, ctx.dropout, seed, _ = inputs
    total, _, mean, rstd = output
    ctx.has_x_bias = x_bias is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(total, weight, mean, rstd, seed)


def _backward(
    ctx: Any, dsum: torch.Tensor | None, dy: torch.Tensor | None, *_statistics: object
) -> tuple[torch.Tensor | None, ...]:
    total, weight, mean, rstd, seed = ctx.saved_tensors
    dy = torch.zeros_like(total) if dy is None else dy.contiguous()
    dsum = None if dsum is None else dsum.contiguous()
    dresidual, dx, dweight, dbias, dx_bias = torch.ops.megatron_ext.add_layer_norm_backward(
        dy, dsum, total, weight, mean, rstd, ctx.has_x_bias, ctx.dropout, seed
    )
    return (
        dx if ctx.dropout > 0 else dresidual,
        dx_bias if ctx.has_x_bias else None,
        dresidual,
        dweight,
        dbias,
        None,
        None,
        None,
    )
