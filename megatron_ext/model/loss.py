"""Loss of each token from logits that tensor ranks hold in slices of the vocabulary."""

import torch
import torch.distributed as dist

from megatron_ext.ops.cross_entropy import Statistics, VocabSlice, cross_entropy
from megatron_ext.ops.kernels import Kernels, is_fused
from megatron_ext.parallel.groups import Layout
from megatron_ext.parallel.vocab import real_slice, reduce_over_vocab, vocab_parallel_cross_entropy


def token_losses(
    logits: torch.Tensor, labels: torch.Tensor, *, vocab_size: int, layout: Layout, kernels: Kernels
) -> torch.Tensor:
    """Negative log-likelihood of each label, float32 (float64 for float64 logits), of the shape of ``labels``.

    Args:
        logits: [..., rows], this tensor rank's slice of the padded vocabulary; is overwritten.
        labels: Ids [...] below ``vocab_size``.
        vocab_size: Ids from here on are padding.
        layout: This rank's place.
        kernels: Which ones compute.
    """
    if not is_fused(kernels, logits):
        return vocab_parallel_cross_entropy(logits, labels, vocab_size=vocab_size, layout=layout)
    first, real = real_slice(logits.shape[-1], vocab_size=vocab_size, layout=layout)
    combine = None if layout.tensor_size == 1 else lambda own: _combined(own, layout)
    return cross_entropy(logits, labels, VocabSlice(first, real, combine), kernels=kernels)


def _combined(own: Statistics, layout: Layout) -> Statistics:
    """Statistics of the whole vocabulary from those of every rank's slice."""
    maximum = own.maximum.clone()
    reduce_over_vocab(maximum, layout, dist.ReduceOp.MAX)
    # A slice that is all padding has maximum -inf and total 0, which add nothing.
    sums = torch.stack([own.total * (own.maximum - maximum).exp(), own.target])
    reduce_over_vocab(sums, layout, dist.ReduceOp.SUM)
    total, target = sums.unbind()
    return Statistics(maximum, total, target)
