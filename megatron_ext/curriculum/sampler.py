"""Which tokens of which sample each sequence of a step reads, for the GLOBAL batch and so for any number of ranks.

truncate (the paper): sequence j of a step is a sample of its own, the ``consumed_samples + j``-th, from its beginning;
what is longer than the step's length is dropped.

recycle: sequence j of every step belongs to lane j of B (B is the batch size, constant over the run). A lane reads the
samples j, j + B, j + 2B, ... end to end as one stream; a step reads ``seq_len`` tokens from where the step before
ended. Every token of the stream is used exactly once, and the sequences of one batch come from different samples.
"""

from dataclasses import dataclass, fields

import numpy as np

from megatron_ext.curriculum.plan import PlannedStep, Tail, TrainingPlan
from megatron_ext.curriculum.schedule import Ints
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class BatchSlices:
    """The sequences of one step (or of one rank's part of it)."""

    samples: Ints
    """[B] dataset sample in which each sequence begins."""

    offsets: Ints
    """[B] position of the sequence's first token in that sample."""

    next_samples: Ints
    """[B] sample on whose first token the sequence goes on after the end of ``samples``; -1 where it does not."""

    seq_len: int
    """Tokens of each sequence."""

    def __len__(self) -> int:
        return len(self.samples)


@dataclass(frozen=True)
class SamplePlan:
    """The sampler of a plan: a pure function of the step, so a resume needs the step number alone."""

    plan: TrainingPlan

    def slices(self, step: int) -> BatchSlices:
        """The global batch of ``step``; IndexError outside the plan."""
        return batch_slices(self.plan[step], seq_len=self.plan.seq_len, tail=self.plan.tail)


def batch_slices(step: PlannedStep, *, seq_len: int, tail: Tail) -> BatchSlices:
    """The global batch of a planned step over samples of ``seq_len`` tokens."""
    lanes = np.arange(step.batch_size, dtype=np.int64)
    nowhere = np.full_like(lanes, -1)
    if tail == "truncate":
        return BatchSlices(
            samples=step.consumed_samples + lanes,
            offsets=np.zeros_like(lanes),
            next_samples=nowhere,
            seq_len=step.seq_len,
        )
    lane_position, rest = divmod(step.consumed_tokens, step.batch_size)
    assert rest == 0, "recycle needs a constant batch size"
    row, offset = divmod(lane_position, seq_len)
    samples = row * step.batch_size + lanes
    return BatchSlices(
        samples=samples,
        offsets=np.full_like(lanes, offset),
        next_samples=samples + step.batch_size if offset + step.seq_len > seq_len else nowhere,
        seq_len=step.seq_len,
    )


def rank_block(batch: BatchSlices, rank: int, ranks: int) -> BatchSlices:
    """The sequences of data-parallel rank ``rank`` of ``ranks``: the rank-th contiguous block of the global batch.

    Raises UserError if the batch does not divide evenly over the ranks.
    """
    assert 0 <= rank < ranks, f"rank {rank} of {ranks}"
    size = _sequences_per_rank(len(batch), ranks)
    block = slice(rank * size, (rank + 1) * size)
    arrays = {field.name: getattr(batch, field.name)[block] for field in fields(batch) if field.name != "seq_len"}
    return BatchSlices(**arrays, seq_len=batch.seq_len)


def data_parallel_size(ranks: int, *, tensor: int) -> int:
    """Ranks among which a batch is divided, where ``tensor`` ranks each hold a part of the model.

    Raises UserError if the ranks do not form whole groups of ``tensor``.
    """
    if ranks % tensor:
        raise UserError(
            f"parallel.tensor is {tensor}, which does not divide the {ranks} rank(s): start a multiple of {tensor} "
            "ranks or lower parallel.tensor"
        )
    return ranks // tensor


def check_batches_divide(plan: TrainingPlan, ranks: int) -> None:
    """Raise UserError if a batch of the plan does not divide evenly over ``ranks`` data-parallel ranks."""
    for batch_size in plan.batch_sizes:
        _sequences_per_rank(batch_size, ranks)


def _sequences_per_rank(batch_size: int, ranks: int) -> int:
    size, rest = divmod(batch_size, ranks)
    if rest:
        raise UserError(
            f"a batch of {batch_size:,} sequences does not divide evenly over {ranks} data-parallel ranks: "
            "make training.batch_size (and training.batch_size_warmup) a multiple of the ranks or start fewer"
        )
    return size


def micro_batch_sizes(sequences: int, seq_len: int, max_tokens: int) -> tuple[int, ...]:
    """Split ``sequences`` sequences of ``seq_len`` tokens into as few micro-batches of at most ``max_tokens`` as fit.

    Sizes are balanced: they differ by at most one, larger ones first. Raises UserError if not even one sequence fits.
    """
    fits = max_tokens // seq_len
    if fits == 0:
        raise UserError(
            f"parallel.micro_batch_tokens is {max_tokens:,}, less than one sequence of {seq_len:,} tokens: set it to "
            f"at least {seq_len:,}"
        )
    count = -(-sequences // fits)
    if count == 0:
        return ()
    size, larger = divmod(sequences, count)
    return (size + 1,) * larger + (size,) * (count - larger)
