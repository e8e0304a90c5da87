"""Layer normalization over the last dimension (Ba et al., arXiv 1607.06450)."""

from typing import Any

import torch
from torch.nn import functional

from megatron_ext.ops.kernels import Kernels, is_fused


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    *,
    eps: float,
    kernels: Kernels,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [..., cols].
        weight: [cols], of x's dtype or float32; so is ``bias``.
        bias: [cols].
        eps: Added to the variance.
        kernels: Which ones compute.

    Returns:
        Of the shape and dtype of ``x``.
    """
    if not is_fused(kernels, x):
        return reference(x, weight, bias, eps=eps)
    y: torch.Tensor = _Fused.apply(x, weight, bias, eps)  # type: ignore[no-untyped-call]
    return y


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The same in plain PyTorch."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.ops.megatron_ext.layer_norm_forward.default(x, weight, bias, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dy = grad_outputs[0].contiguous()
        return *torch.ops.megatron_ext.layer_norm_backward.default(dy, *ctx.saved_tensors), None


def _fake_forward(x: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    dy: torch.Tensor, _x: torch.Tensor, weight: torch.Tensor, *_rest: object
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)


FAKES = {"layer_norm_forward": _fake_forward, "layer_norm_backward": _fake_backward}
