"""The end of a sublayer of a transformer: bias, dropout and residual."""

from typing import Any

import torch

from megatron_ext.ops.dropout import dropped, seed_for
from megatron_ext.ops.kernels import Kernels, is_fused

_FORWARD = "megatron_ext::bias_dropout_add_forward"
_BACKWARD = "megatron_ext::bias_dropout_add_backward"


def bias_dropout_add(
    x: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor, *, dropout: float, kernels: Kernels
) -> torch.Tensor:
    """residual + dropout(x + bias).

    Args:
        x: [..., cols].
        bias: [cols], of x's dtype or float32, or None.
        residual: Of the shape and dtype of ``x``.
        dropout: Probability with which an element of x + bias is dropped; 0 where the model does not train.
        kernels: Which ones compute. Both draw the same mask.
    """
    seed = seed_for(dropout, x.device)
    if not is_fused(kernels, x):
        return reference(x, bias, residual, dropout=dropout, seed=seed)
    y: torch.Tensor = torch.ops.megatron_ext.bias_dropout_add_forward(
        x.contiguous(), bias, residual.contiguous(), dropout, seed
    )
    return y


def reference(
    x: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor,
    *,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same in plain PyTorch."""
    return residual + dropped(x if bias is None else x + bias, dropout, seed)


def register() -> None:
    """Tell torch shapes and derivatives; the library with the schemas is loaded."""
    torch.library.register_fake(_FORWARD, lambda x, *_rest: torch.empty_like(x))
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _backward, setup_context=_keep)


def _fake_backward(
    dy: torch.Tensor, bias: torch.Tensor | None, dropout: float, _seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(dy) if dropout > 0 else dy.new_empty(0)
    return dx, dy.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch passes it by name
    _, bias, _, ctx.dropout, seed = inputs
    ctx.save_for_backward(bias, seed)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    bias, seed = ctx.saved_tensors
    dx, dbias = torch.ops.megatron_ext.bias_dropout_add_backward(dy.contiguous(), bias, ctx.dropout, seed)
    return dx if ctx.dropout > 0 else dy, None if bias is None else dbias, dy, None, None
