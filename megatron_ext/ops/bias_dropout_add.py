"""The end of a sublayer of a transformer: bias, dropout and residual."""

from typing import Any

import torch

from megatron_ext.ops.dropout import dropped, seed_for
from megatron_ext.ops.kernels import Kernels, is_fused


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
    y: torch.Tensor = _Fused.apply(x, bias, residual, dropout, seed)  # type: ignore[no-untyped-call]
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


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor,
        dropout: float,
        seed: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.dropout = dropout
        ctx.save_for_backward(bias, seed)
        y: torch.Tensor = torch.ops.megatron_ext.bias_dropout_add_forward.default(
            x.contiguous(), bias, residual.contiguous(), dropout, seed
        )
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        bias, seed = ctx.saved_tensors
        dy = grad_outputs[0].contiguous()
        if ctx.dropout == 0 and bias is None:
            return dy, None, dy, None, None
        dx, dbias = torch.ops.megatron_ext.bias_dropout_add_backward.default(dy, bias, ctx.dropout, seed)
        return dx if ctx.dropout > 0 else dy, None if bias is None else dbias, dy, None, None


def _fake_backward(
    dy: torch.Tensor, bias: torch.Tensor | None, dropout: float, _seed: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    dx = torch.empty_like(dy) if dropout > 0 else dy.new_empty(0)
    return dx, dy.new_empty(0) if bias is None else torch.empty_like(bias)


FAKES = {"bias_dropout_add_forward": lambda x, *_rest: torch.empty_like(x), "bias_dropout_add_backward": _fake_backward}
