"""Softmax of attention scores with scale, causal mask and dropout in one pass over them."""

from typing import Any

import torch

from megatron_ext.ops.dropout import dropped, seed_for
from megatron_ext.ops.kernels import Kernels, is_fused


def causal_softmax(scores: torch.Tensor, *, scale: float, dropout: float, kernels: Kernels) -> torch.Tensor:
    """dropout(softmax(scale * scores)) over the keys up to each query, 0 beyond.

    Args:
        scores: [..., queries, keys], at least as many keys as queries, of any length from 1. The last query sees all
            keys; what a query does not see is never read.
        scale: Multiplies the scores.
        dropout: Of the probabilities; 0 where the model does not train.
        kernels: Which ones compute. Both draw the same mask.

    Returns:
        Of the shape and dtype of ``scores``.
    """
    seed = seed_for(dropout, scores.device)
    if not is_fused(kernels, scores):
        return reference(scores, scale=scale, dropout=dropout, seed=seed)
    result: torch.Tensor = _Fused.apply(scores, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return result


def reference(
    scores: torch.Tensor, *, scale: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """The same in plain PyTorch."""
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    # In float32 or better, as the kernels compute.
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return dropped(wide.masked_fill(future, -torch.inf).softmax(dim=-1), dropout, seed).to(scores.dtype)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scores: torch.Tensor, scale: float, dropout: float, seed: torch.Tensor | None
    ) -> torch.Tensor:
        probs, after = torch.ops.megatron_ext.causal_softmax_forward.default(scores.contiguous(), scale, dropout, seed)
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(probs, seed)
        return after if dropout > 0 else probs  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probs, seed = ctx.saved_tensors
        dscores = torch.ops.megatron_ext.causal_softmax_backward.default(
            grad_outputs[0].contiguous(), probs, ctx.scale, ctx.dropout, seed
        )
        return dscores, None, None, None


def _fake_forward(scores: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dropout = rest[-2]
    return torch.empty_like(scores), torch.empty_like(scores) if dropout > 0 else scores.new_empty(0)


FAKES = {"causal_softmax_forward": _fake_forward, "causal_softmax_backward": lambda dy, *_rest: torch.empty_like(dy)}
