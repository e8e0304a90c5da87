"""Samples that a run passes over because it rolled back over the steps that had read them.

A plan counts the samples that it draws: 0, 1, 2, ... Without skipped samples these positions are dataset samples. With
them, position p is the p-th sample that is not skipped; behind the last sample it goes on with the first, so that a
run reads as many samples as its plan says and the dataset stays the one it began with.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from megatron_ext.curriculum.plan import Tail, TrainingPlan
from megatron_ext.curriculum.sampler import BatchSlices, batch_slices
from megatron_ext.curriculum.schedule import Ints


@dataclass(frozen=True)
class SkippedSamples:
    """Ranges of dataset samples. With ``recycle`` these are whole rows of a sample for every lane."""

    total: int
    """Samples in the dataset."""

    ranges: tuple[tuple[int, int], ...] = ()
    """(first, count) each, rising, neither touching nor overlapping."""

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
    tail: Tail = plan.tail
    first = batch_slices(plan[first_step], seq_len=plan.seq_len, tail=tail)
    last = batch_slices(plan[last_step], seq_len=plan.seq_len, tail=tail)
    return range(int(first.samples.min()), 1 + int(max(last.samples.max(), last.next_samples.max())))
