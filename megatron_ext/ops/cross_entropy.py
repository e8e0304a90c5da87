"""Cross-entropy over a slice of the vocabulary, whose gradient takes the place of the logits.

The logits of a language model, [tokens, 50257], are the largest tensor of a step. The fused kernels read them in their
own dtype, keep three numbers of each row, and write the gradient over them in backward: no second tensor of that size
ever exists, and no float32 copy of half-precision logits.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from megatron_ext.ops.kernels import Kernels, is_fused


@dataclass(frozen=True)
class Statistics:
    """What is known of each row's logits, all float32 [rows]."""

    maximum: torch.Tensor  # largest logit; -inf without any
    total: torch.Tensor  # sum of exp(logit - maximum)
    target: torch.Tensor  # the label's logit; 0 where the slice does not hold the label


@dataclass(frozen=True)
class VocabSlice:
    """Which ids the columns of the logits are, and how to get from the slice to the whole vocabulary."""

    first: int  # id of the first column
    real: int  # columns that are ids; what follows is padding, which has no probability and no gradient
    # The whole vocabulary's statistics from the slice's, over the ranks that hold the others; None: it is all here.
    combine: Callable[[Statistics], Statistics] | None = None


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, vocab: VocabSlice, *, kernels: Kernels) -> torch.Tensor:
    """Negative log-likelihood of each label.

    Args:
        logits: [..., cols]; overwritten by its gradient in backward, so nothing else may read it then.
        labels: Ids int64 [...], those of other slices too.
        vocab: What the columns are.
        kernels: Which ones compute.

    Returns:
        float32 (float64 for float64 logits), of the shape of ``labels``.
    """
    if not is_fused(kernels, logits):
        return reference(logits, labels, vocab)
    loss: torch.Tensor = _Fused.apply(logits, labels, vocab)  # type: ignore[no-untyped-call]
    return loss


def reference(logits: torch.Tensor, labels: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
    """The same in plain PyTorch, for a vocabulary that is all here; leaves the logits alone."""
    assert vocab.combine is None, "the reference over several ranks is parallel.vocab's"
    work = logits[..., : vocab.real]
    work = work.to(torch.promote_types(work.dtype, torch.float32))
    losses = torch.nn.functional.cross_entropy(
        work.reshape(-1, vocab.real), (labels - vocab.first).reshape(-1), reduction="none"
    )
    return losses.view(labels.shape)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab: VocabSlice) -> torch.Tensor:
        logits, ids = logits.contiguous(), labels.contiguous()
        forward = torch.ops.megatron_ext.cross_entropy_forward.default
        own = Statistics(*forward(logits, ids, vocab.first, vocab.real))
        whole = own if vocab.combine is None else vocab.combine(own)
        ctx.first, ctx.real = vocab.first, vocab.real
        ctx.save_for_backward(logits, ids, whole.maximum, whole.total)
        # The difference first: where logits are large, the logarithm would lose its bits in the maximum.
        return (whole.total.log() + (whole.maximum - whole.target)).view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, ids, maximum, total = ctx.saved_tensors
        if torch.compiler.is_compiling():
            # A traced backward pass may not change what the forward pass was given.
            logits = logits.clone()
        else:
            # Whoever else has saved the logits, or asks for a second backward pass, is refused by autograd.
            torch.autograd.graph.increment_version(logits)
        grad = grad_outputs[0].reshape(-1).contiguous()
        torch.ops.megatron_ext.cross_entropy_backward_.default(logits, ids, maximum, total, grad, ctx.first, ctx.real)
        return logits, None, None


def _fake_forward(logits: torch.Tensor, *_rest: object) -> tuple[torch.Tensor, ...]:
    rows = logits.numel() // logits.shape[-1]
    return tuple(logits.new_empty(rows, dtype=torch.float32) for _ in range(3))


FAKES = {"cross_entropy_forward": _fake_forward, "cross_entropy_backward_": lambda *_arguments: None}
