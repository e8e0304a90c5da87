"""Bias and GELU (Hendrycks and Gimpel, arXiv 1606.08415) of a transformer's MLP."""

from typing import Any

import torch
from torch.nn import functional

from megatron_ext.ops.kernels import Kernels, is_fused

_FORWARD = "megatron_ext::bias_gelu_forward"
_BACKWARD = "megatron_ext::bias_gelu_backward"


def bias_gelu(x: torch.Tensor, bias: torch.Tensor | None, *, exact: bool, kernels: Kernels) -> torch.Tensor:
    """gelu(x + bias).

    Args:
        x: [..., cols].
        bias: [cols], of x's dtype or float32, or None.
        exact: With erf; otherwise in the tanh approximation of GPT-2.
        kernels: Which ones compute.
    """
    if not is_fused(kernels, x):
        return reference(x, bias, exact=exact)
    y: torch.Tensor = torch.ops.megatron_ext.bias_gelu_forward(x.contiguous(), bias, exact)
    return y


def reference(x: torch.Tensor, bias: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    """The same in plain PyTorch."""
    return functional.gelu(x if bias is None else x + bias, approximate="none" if exact else "tanh")


def register() -> None:
    """Tell torch shapes and derivatives; the library with the schemas is loaded."""
    torch.library.register_fake(_FORWARD, lambda x, _bias, _exact: torch.empty_like(x))
    torch.library.register_fake(_BACKWARD, _fake_backward)
    torch.library.register_autograd(_FORWARD, _backward, setup_context=_keep)


def _fake_backward(
    dy: torch.Tensor, _x: torch.Tensor, bias: torch.Tensor | None, _exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(dy), dy.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:  # noqa: ARG001 - torch passes it by name
    x, bias, ctx.exact = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.megatron_ext.bias_gelu_backward(dy.contiguous(), x, bias, ctx.exact)
    return dx, None if bias is None else dbias, None
