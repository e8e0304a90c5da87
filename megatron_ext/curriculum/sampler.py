"""Which tokens of which sample each sequence of a step reads, for the global batch and so for any number of ranks.

truncate (the paper): sequence j of a step is a sample of its own, the ``consumed_samples + j``-th, from its beginning;
what is longer than the step's length is dropped.

recycle: sequence j of every step belongs to stream j of B (B is the batch size, constant over the run). It reads the
samples j, j + B, j + 2B, ... end to end; a step reads ``seq_len`` tokens from where the step before
ended. Every token is used exactly once, and the sequences of one batch come from different samples.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megatron_ext.curriculum.pacing import Tail
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.segments import Ints
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class BatchSlices:
    """The sequences of one step (or of one rank's part of it)."""

    samples: Ints  # [B] dataset sample in which each sequence begins
    offsets: Ints  # [B] position of the sequence's first token in that sample
    # [B] sample on whose first token the sequence goes on after the end of ``samples``; -1 where it does not.
    next_samples: Ints
    seq_len: int  # tokens of each sequence

    def __len__(self) -> int:
        return len(self.samples)


def global_batch(plan: TrainingPlan, step: int) -> BatchSlices:
    """The global batch of a step, from the step's number alone; IndexError outside the plan."""
    return batch_slices(plan[step], seq_len=plan.seq_len, tail=plan.tail)


def batch_slices(step: PlannedStep, *, seq_len: int, tail: Tail) -> BatchSlices:
    """The global batch of a planned step over samples of ``seq_len`` tokens."""
    streams = np.arange(step.batch_size, dtype=np.int64)  # [B]
    nowhere = np.full_like(streams, -1)
    if tail == "truncate":
        return BatchSlices(
            samples=step.consumed_samples + streams,
            offsets=np.zeros_like(streams),
            next_samples=nowhere,
            seq_len=step.seq_len,
        )
    # All streams have read the same number of tokens: whole samples, and a part of one. A sequence that reaches the end
    # of its sample goes on in the stream's next one, B samples later.
    position, rest = divmod(step.consumed_tokens, step.batch_size)
    assert rest == 0, "recycle needs a constant batch size"
    row, offset = divmod(position, seq_len)
    samples = row * step.batch_size + streams
    return BatchSlices(
        samples=samples,
        offsets=np.full_like(streams, offset),
        next_samples=samples + step.batch_size if offset + step.seq_len > seq_len else nowhere,
        seq_len=step.seq_len,
    )


def rank_block(batch: BatchSlices, rank: int, ranks: int) -> BatchSlices:
    """The rank-th contiguous block of the global batch. Raises UserError if it does not divide over ``ranks``."""
    assert 0 <= rank < ranks, f"rank {rank} of {ranks}"
    size = _sequences_per_rank(len(batch), ranks)
    block = slice(rank * size, (rank + 1) * size)
    arrays = {field.name: getattr(batch, field.name)[block] for field in fields(batch) if field.name != "seq_len"}
    return BatchSlices(**arrays, seq_len=batch.seq_len)


def data_parallel_size(ranks: int, *, tensor: int) -> int:
    """Ranks that share a batch, where ``tensor`` ranks hold one model. Raises UserError if that leaves ranks over."""
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


@dataclass(frozen=True)
class SkippedSamples:
    """Samples that a run passes over because it rolled back over the steps that had read them.

    A plan counts the samples that it draws: 0, 1, 2, ... Without skipped samples these positions are dataset samples.
    With them, position p is the p-th sample that is not skipped; behind the last sample it goes on with the first, so
    that a run reads as many samples as its plan says and the dataset stays the one it began with. With ``recycle``
    whole rows, of a sample for every stream, are skipped.
    """

    total: int  # samples in the dataset
    ranges: tuple[tuple[int, int], ...] = ()  # (first, count) each, rising, neither touching nor overlapping

    @classmethod
    def none(cls, total: int, plan: TrainingPlan) -> "SkippedSamples":
        """Nothing skipped of ``total`` samples; with ``recycle`` of as many as fill rows of the plan's batch size."""
        row = 1 if plan.tail == "truncate" else plan[0].batch_size
        return cls(total // row * row)

    @property
    def left(self) -> int:
        """Samples that are not skipped."""
        return self.total - sum(count for _, count in self.ranges)

    def samples(self, positions: Ints) -> Ints:
        """Dataset samples at ``positions`` of the plan, of any shape."""
        found = positions % self.left
        for first, count in self.ranges:
            found = np.where(found >= first, found + count, found)
        return found

    def applied(self, batch: BatchSlices) -> BatchSlices:
        """The batch with positions of the plan turned into dataset samples."""
        if not self.ranges:
            return batch
        following = np.where(batch.next_samples < 0, batch.next_samples, self.samples(batch.next_samples))
        return replace(batch, samples=self.samples(batch.samples), next_samples=following)

    def without(self, positions: range) -> "SkippedSamples":
        """Skip the samples at these positions, too."""
        more = np.unique(self.samples(np.arange(positions.start, positions.stop, dtype=np.int64)))
        skipped = np.zeros(self.total + 2, dtype=np.int8)
        skipped[more + 1] = 1
        for first, count in self.ranges:
            skipped[first + 1 : first + 1 + count] = 1
        edges = np.diff(skipped)
        firsts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
        return replace(self, ranges=tuple(zip(firsts.tolist(), (ends - firsts).tolist(), strict=True)))

    def to_json(self) -> list[list[int]]:
        """The ranges as a checkpoint holds them."""
        return [list(pair) for pair in self.ranges]

    def with_ranges(self, ranges: Sequence[Sequence[int]]) -> "SkippedSamples":
        """The same dataset with the ranges that ``to_json`` gave."""
        return replace(self, ranges=tuple((first, count) for first, count in ranges))


def positions_between(plan: TrainingPlan, first_step: int, last_step: int) -> range:
    """Positions of the samples from which the steps ``first_step`` to ``last_step`` (included) read."""
    first, last = global_batch(plan, first_step), global_batch(plan, last_step)
    return range(int(first.samples.min()), 1 + int(max(last.samples.max(), last.next_samples.max())))
