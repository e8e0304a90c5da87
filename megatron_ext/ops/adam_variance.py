"""Norms of sqrt(v), v being Adam's second moment, in one pass over it."""

import torch

from megatron_ext.ops.kernels import Kernels, is_fused


def adam_variance(v: torch.Tensor, *, kernels: Kernels) -> torch.Tensor:
    """l1 norm and largest element of sqrt(v): float64 [2], on the device of ``v``.

    ``v`` [n], n >= 1. A NaN in it gives NaN in the sum; the maximum is then not defined.
    """
    if not is_fused(kernels, v):
        return reference(v)
    result: torch.Tensor = torch.ops.megatron_ext.adam_variance.default(v.contiguous())
    return result


def reference(v: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch."""
    roots = v.double().sqrt()
    return torch.stack([roots.sum(), roots.max()])


FAKES = {"adam_variance": lambda v: v.new_empty(2, dtype=torch.float64)}
