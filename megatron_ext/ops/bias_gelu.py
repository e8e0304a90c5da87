"""Bias and GELU (Hendrycks and Gimpel, arXiv 1606.08415) of a transformer's MLP."""

from typing import Any

import torch
from torch.nn import functional

from megatron_ext.ops.kernels import Kernels, is_fused


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
    y: torch.Tensor = _Fused.apply(x, bias, exact)  # type: ignore[no-untyped-call]
    return y


def reference(x: torch.Tensor, bias: torch.Tensor | None, *, exact: bool) -> torch.Tensor:
    """The same in plain PyTorch."""
    return functional.gelu(x if bias is None else x + bias, approximate="none" if exact else "tanh")


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, exact: bool) -> torch.Tensor:
        x = x.contiguous()
        ctx.exact = exact
        ctx.save_for_backward(x, bias)
        y: torch.Tensor = torch.ops.megatron_ext.bias_gelu_forward.default(x, bias, exact)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx, dbias = torch.ops.megatron_ext.bias_gelu_backward.default(grad_outputs[0].contiguous(), x, bias, ctx.exact)
        return dx, None if bias is None else dbias, None


def _fake_backward(
    dy: torch.Tensor, _x: torch.Tensor, bias: torch.Tensor | None, _exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(dy), dy.new_empty(0) if bias is None else torch.empty_like(bias)


FAKES = {"bias_gelu_forward": lambda x, _bias, _exact: torch.empty_like(x), "bias_gelu_backward": _fake_backward}
