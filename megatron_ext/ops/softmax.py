"""Softmax of attention scores with scale, mask and dropout in one pass over them."""

import functools
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
    probs, after = torch.ops.megatron_ext.causal_softmax_forward(scores.contiguous(), scale, dropout, seed)
    result: torch.Tensor = after if dropout > 0 else probs
    return result


def causal_reference(
    scores: torch.Tensor, *, scale: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """``causal_softmax`` in plain PyTorch."""
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).triu(keys - queries + 1)
    return dropped(_softmax(scores, scale).masked_fill(future, -torch.inf).softmax(dim=-1), dropout, seed).to(
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
    probs, after = torch.ops.megatron_ext.masked_softmax_forward(
        scores.contiguous(), mask.contiguous(), scale, dropout, seed
    )
    result: torch.Tensor = after if dropout > 0 else probs
    return result


def masked_reference(
    scores: torch.Tensor, mask: torch.Tensor, *, scale: float, dropout: float = 0.0, seed: torch.Tensor | None = None
) -> torch.Tensor:
    """``masked_softmax`` in plain PyTorch."""
    # Where everything is masked, softmax is NaN and its gradient too; there the scores are taken as they are, then 0.
    nothing = mask.all(dim=-1, keepdim=True)
    masked = _softmax(scores, scale).masked_fill(mask & ~nothing, -torch.inf)
    return dropped(masked.softmax(dim=-1).masked_fill(nothing, 0.0), dropout, seed).to(scores.dtype)


def _softmax(scores: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled scores in float32 or better, as the kernels have them."""
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale


def register() -> None:
    """Tell torch shapes and derivatives; the library with the schemas is loaded."""
    for kind in ("causal", "masked"):
        name = f"megatron_ext::{kind}_softmax"
        torch.library.register_fake(f"{name}_forward", _fake_forward)
        torch.library.register_fake(f"{name}_backward", lambda dy, *_rest: torch.empty_like(dy))
        backward = functools.partial(_backward, f"{kind}_softmax_backward")
        torch.library.register_autograd(f"{name}_forward", backward, setup_context=_keep)


def _fake_forward(scores: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dropout = rest[-2]
    return torch.empty_like(scores), torch.empty_like(scores) if dropout > 0 else scores.new_empty(0)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    ctx.scale, ctx.dropout, seed = inputs[-3:]
    ctx.others = len(inputs) - 1
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0], seed)


def _backward(
    name: str, ctx: Any, dprobs: torch.Tensor | None, dafter: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    dy = dafter if ctx.dropout > 0 else dprobs
    if dy is None:
        return (None,) * (ctx.others + 1)
    probs, seed = ctx.saved_tensors
    dscores = getattr(torch.ops.megatron_ext, name)(dy.contiguous(), probs, ctx.scale, ctx.dropout, seed)
    others: tuple[None, ...] = (None,) * ctx.others
    return (dscores, *others)
