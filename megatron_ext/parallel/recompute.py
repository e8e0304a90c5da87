"""Activation checkpointing that replays both random streams (megatron-core's own needs CUDA's).

After Chen et al., "Training Deep Nets with Sublinear Memory Cost" (arXiv 1604.06174), reentrant like
torch.utils.checkpoint(use_reentrant=True): the whole function runs again inside backward, through its modules' hooks,
which ZeRO 3 needs to gather the parameters.
"""

from collections.abc import Callable
from typing import Any

import torch

from megatron_ext.parallel.rng import RngStreams


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[[torch.Tensor], torch.Tensor], streams: RngStreams, hidden: torch.Tensor
    ) -> torch.Tensor:
        ctx.function, ctx.streams, ctx.snapshot = function, streams, streams.snapshot()
        ctx.save_for_backward(hidden)
        with torch.no_grad():
            return function(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[None, None, torch.Tensor | None]:
        hidden = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), ctx.streams.replay(ctx.snapshot):
            output = ctx.function(hidden)
        torch.autograd.backward(output, grad_outputs[0])
        return None, None, hidden.grad


def recompute(
    function: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, *, streams: RngStreams
) -> torch.Tensor:
    """``function(hidden)`` that keeps ``hidden`` alone and runs again in backward, with the same random numbers.

    ``hidden`` must require a gradient. Backward needs ``loss.backward()``; torch.autograd.grad does not reach the
    parameters.
    """
    assert hidden.requires_grad, "recomputation starts from a tensor that requires a gradient"
    output: torch.Tensor = _Recompute.apply(function, streams, hidden)  # type: ignore[no-untyped-call]
    return output
