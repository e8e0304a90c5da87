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
    keep_output: bool = False,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [..., cols].
        weight: [cols], of x's dtype or float32; so is ``bias``.
        bias: [cols].
        eps: Added to the variance.
        kernels: Which ones compute.
        keep_output: For backward keep the result, which the layer that reads it keeps anyway, instead of ``x``, which
            is then found again from it. No weight may be 0, and where weights are small x is found less exactly.

    Returns:
        Of the shape and dtype of ``x``.
    """
    if not is_fused(kernels, x):
        return reference(x, weight, bias, eps=eps)
    y: torch.Tensor = _Fused.apply(x, weight, bias, eps, keep_output)  # type: ignore[no-untyped-call]
    return y


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The same in plain PyTorch."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, keep_output: bool
    ) -> torch.Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.ops.megatron_ext.layer_norm_forward.default(x, weight, bias, eps)
        ctx.keep_output = keep_output
        if keep_output:
            ctx.save_for_backward(y, weight, bias, rstd)
        else:
            ctx.save_for_backward(x, weight, bias, rstd, mean)
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved, weight, bias, rstd, *mean = ctx.saved_tensors
        gradients = torch.ops.megatron_ext.layer_norm_backward.default(
            grad_outputs[0].contiguous(), saved, ctx.keep_output, weight, bias, mean[0] if mean else None, rstd
        )
        return (*gradients, None, None)


def register() -> None:
    """Tell torch the results' shapes; the library with the schemas is loaded."""
    torch.library.register_fake("megatron_ext::layer_norm_forward", _fake_forward)
    torch.library.register_fake("megatron_ext::layer_norm_backward", _fake_backward)


def _fake_forward(x: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    dy: torch.Tensor, _saved: torch.Tensor, _is_output: bool, weight: torch.Tensor, *_rest: object
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)
