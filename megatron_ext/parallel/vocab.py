"""Cross-entropy and gathering of logits that the tensor-parallel ranks hold in slices of the vocabulary.

The embedding is padded to a convenient number of rows. Here the padding takes no part: no probability, no gradient. So
neither the loss nor the logits depend on how much of it there is, which differs from megatron-core's cross-entropy
(tensor_parallel/cross_entropy.py), whose scheme for splitting the vocabulary this follows otherwise.
"""

from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.parallel.groups import Layout


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, layout: Layout) -> torch.Tensor:
        # logits [..., rows], labels [...]. In place from here on: nothing else reads the logits, and they are the
        # largest tensor of the step.
        work = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        first, columns = real_slice(work.shape[-1], vocab_size=vocab_size, layout=layout)
        real = work[..., :columns]  # [..., rows without padding], a view

        # loss = log(sum exp(z - m)) - (z_label - m); with m the largest logit of all slices no exp overflows.
        if columns:
            maximum = real.amax(dim=-1)  # [...]
        else:
            maximum = torch.full(labels.shape, -torch.inf, dtype=work.dtype, device=work.device)
        reduce_over_vocab(maximum, layout, dist.ReduceOp.MAX)
        real.sub_(maximum.unsqueeze(-1))

        # Each label's logit is in one rank's slice; the others add 0.
        index = labels - first
        inside = (index >= 0) & (index < columns)
        index = torch.where(inside, index, 0).unsqueeze(-1)  # [..., 1]
        target = torch.where(inside, work.gather(-1, index).squeeze(-1), 0.0)

        # Both sums in one all-reduce: [2, ...].
        real.exp_()
        sums = torch.stack([target, real.sum(dim=-1)])
        reduce_over_vocab(sums, layout, dist.ReduceOp.SUM)
        target, total = sums.unbind()

        # Backward starts from exp(z - m), zero for padding.
        work[..., columns:] = 0.0
        ctx.save_for_backward(work, total, index, inside)
        ctx.dtype = logits.dtype
        return total.log() - target

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # d loss / d z = softmax(z) - onehot(label), times the gradient [...] of each loss.
        work, total, index, inside = ctx.saved_tensors
        grad = grad_outputs[0]
        work.mul_((grad / total).unsqueeze(-1))
        work.scatter_add_(-1, index, -(grad * inside).unsqueeze(-1))
        return work.to(ctx.dtype), None, None, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, layout: Layout
) -> torch.Tensor:
    """Negative log-likelihood of each label, float32 (float64 for float64 logits), of the shape of ``labels``.

    ``logits`` [..., rows] is this tensor rank's slice of the padded vocabulary and is overwritten; ``labels`` [...] are
    ids below ``vocab_size``. Rows from ``vocab_size`` on are padding.
    """
    loss: torch.Tensor = _CrossEntropy.apply(logits, labels, vocab_size, layout)  # type: ignore[no-untyped-call]
    return loss


def real_slice(rows: int, *, vocab_size: int, layout: Layout) -> tuple[int, int]:
    """First id of this tensor rank's slice of ``rows`` rows, and how many of its rows are ids and no padding."""
    first = layout.tensor_rank * rows
    return first, max(0, min(rows, vocab_size - first))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, layout: Layout) -> torch.Tensor:
        ctx.layout = layout
        parts = [torch.empty_like(part) for _ in range(layout.tensor_size)]
        dist.all_gather(parts, part.contiguous(), group=layout.tensor_group)
        return torch.cat(parts, dim=-1)  # t times [..., rows] -> [..., t * rows]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Every rank computes the same function of the gathered tensor, so its own slice of the gradient is whole.
        return grad_outputs[0].chunk(ctx.layout.tensor_size, dim=-1)[ctx.layout.tensor_rank].contiguous(), None


def gather_vocab(logits: torch.Tensor, *, vocab_size: int, layout: Layout) -> torch.Tensor:
    """Logits [..., vocab_size] on every tensor rank from their slices [..., rows]; the padding is cut off."""
    if layout.tensor_size > 1:
        logits = _Gather.apply(logits.contiguous(), layout)  # type: ignore[no-untyped-call]
    return logits[..., :vocab_size]


def reduce_over_vocab(tensor: torch.Tensor, layout: Layout, operation: dist.ReduceOp.RedOpType) -> None:
    """Combine ``tensor`` in place over the ranks that hold the slices of the vocabulary."""
    if layout.tensor_size > 1:
        dist.all_reduce(tensor, op=operation, group=layout.tensor_group)
