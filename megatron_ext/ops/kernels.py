"""Which kernels an operation uses, and what the fused ones can take."""

from typing import Literal

import torch

Kernels = Literal["fused", "reference"]
"""Compiled from csrc/, or plain PyTorch. Decided once (``choice.py``) and passed to whatever computes."""

_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})


def is_fused(kernels: Kernels, tensor: torch.Tensor) -> bool:
    """Whether an operation on ``tensor`` goes to the fused kernels; float64 never does."""
    return kernels == "fused" and tensor.dtype in _DTYPES
