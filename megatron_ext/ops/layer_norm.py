"""Layer normalization over the last dimension (Ba et al., arXiv 1607.06450)."""

from typing import Any

import torch
from torch.nn import functional

from megatron_ext.ops.kernels import Kernels, is_fused

_FORWARD = "megatron_ext::layer_norm_forward"
_BACKWARD = "megatron_ext::layer_norm_backward"


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
    y: torch.Tensor = torch.ops.megatron_ext.layer_norm_forward(x.contiguous(), weight, bias, eps, keep_output)[0]
    return y


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *, eps: float) -> torch.Tensor:
    """The same in plain PyTorch."""
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def register() -> None:
    """Tell torch shapes and derivatives; the library with the schemas is loaded."""
    torch.library.register_fake(_FORWARD, _fake_forward)
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _backward, setup_context=_keep)


def _fake_forward(
    x: torch.Tensor, _weight: torch.Tensor, _bias: torch.Tensor, _eps: float, _keep_output: bool
) -> tuple[torch.Tensor, ...]:
    rows = x.numel() // x.shape[-1]
    return torch.empty_like(x), x.new_empty(rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    dy: torch.Tensor, _saved: torch.Tensor, _is_output: bool, weight: torch.Tensor, *_rest: object
) -> tuple[torch.Tensor, ...]:
    return torch.empty_like(dy), torch.empty_like(weight), torch.empty_like(weight)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, _, ctx.keep_output = inputs
    y, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y if ctx.keep_output else x, weight, bias, None if ctx.keep_output else mean, rstd)


def _backward(ctx: Any, dy: torch.Tensor | None, *_statistics: object) -> tuple[torch.Tensor | None, ...]:
    if dy is None:
        return None, None, None, None, None
    saved, weight, bias, mean, rstd = ctx.saved_tensors
    gradients = torch.ops.megatron_ext.layer_norm_backward(
        dy.contiguous(), saved, ctx.keep_output, weight, bias, mean, rstd
    )
    return (*gradients, None, None)
