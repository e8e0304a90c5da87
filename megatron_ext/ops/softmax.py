"""Softmax of attention scores with scale, mask and dropout in one pass over them."""

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
        return causal_reference(scores, scale=scale, dropout=dropout, seed=seed)
    result: torch.Tensor = _Causal.apply(scores, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return result


def causal_reference(
    scores: torch.Tensor, *, scale: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """``causal_softmax`` in plain PyTorch."""
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return dropped(_scaled(scores, scale).masked_fill(future, -torch.inf).softmax(dim=-1), dropout, seed).to(
        scores.dtype
    )


def masked_softmax(
    scores: torch.Tensor, mask: torch.Tensor, *, scale: float, dropout: float, kernels: Kernels
) -> torch.Tensor:
    """dropout(softmax(scale * scores)) where ``mask`` is False, 0 where it is True and in rows that are all masked.

    Args:
        scores: [batch, heads, queries, keys].
        mask: bool [batch or 1, 1, queries, keys].
        scale: Multiplies the scores.
        dropout: Of the probabilities; 0 where the model does not train.
        kernels: Which ones compute. Both draw the same mask.

    Returns:
        Of the shape and dtype of ``scores``.
    """
    seed = seed_for(dropout, scores.device)
    if not is_fused(kernels, scores):
        return masked_reference(scores, mask, scale=scale, dropout=dropout, seed=seed)
    result: torch.Tensor = _Masked.apply(scores, mask, scale, dropout, seed)  # type: ignore[no-untyped-call]
    return result


def masked_reference(
    scores: torch.Tensor, mask: torch.Tensor, *, scale: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """``masked_softmax`` in plain PyTorch."""
    # Where everything is masked, softmax is NaN and its gradient too; there the scores are taken as they are, then 0.
    nothing = mask.all(dim=-1, keepdim=True)
    masked = _scaled(scores, scale).masked_fill(mask & ~nothing, -torch.inf)
    return dropped(masked.softmax(dim=-1).masked_fill(nothing, 0.0), dropout, seed).to(scores.dtype)


def _scaled(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled scores in float32 or better, as the kernels have them."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale


class _Causal(torch.autograd.Function):
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


class _Masked(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any, scores: torch.Tensor, mask: torch.Tensor, scale: float, dropout: float, seed: torch.Tensor | None
    ) -> torch.Tensor:
        probs, after = torch.ops.megatron_ext.masked_softmax_forward.default(
            scores.contiguous(), mask.contiguous(), scale, dropout, seed
        )
        ctx.scale, ctx.dropout = scale, dropout
        ctx.save_for_backward(probs, seed)
        return after if dropout > 0 else probs  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        probs, seed = ctx.saved_tensors
        dscores = torch.ops.megatron_ext.masked_softmax_backward.default(
            grad_outputs[0].contiguous(), probs, ctx.scale, ctx.dropout, seed
        )
        return dscores, None, None, None, None


def register() -> None:
    """Tell torch the results' shapes; the library with the schemas is loaded."""
    for kind in ("causal", "masked"):
        torch.library.register_fake(f"megatron_ext::{kind}_softmax_forward", _fake_forward)
        torch.library.register_fake(f"megatron_ext::{kind}_softmax_backward", lambda dy, *_rest: torch.empty_like(dy))


def _fake_forward(scores: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dropout = rest[-2]
    return torch.empty_like(scores), torch.empty_like(scores) if dropout > 0 else scores.new_empty(0)
