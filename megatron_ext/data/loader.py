"""Batches for one rank: a planned step's slices of the samples, and the fixed sequences of a validation.

Both are functions of a step number and a layout. There is no other state, so resuming needs nothing from a checkpoint,
and the global batch is the same for any number of data-parallel ranks. A thread prepares the steps to come.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from types import TracebackType
from typing import Generic, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from megatron_ext.curriculum.pacing import Tail
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.sampler import (
    SkippedSamples,
    batch_slices,
    check_batches_divide,
    micro_batch_sizes,
    rank_block,
)
from megatron_ext.data.datasets import Samples

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls ``produce`` on each of ``items`` in order, by a thread, up to ``depth`` results ahead of :meth:`next`.

    The thread ends on :meth:`close` and when the prefetcher is garbage.
    """

    def __init__(self, produce: Callable[[int], T], items: Iterable[int], *, depth: int) -> None:
        assert depth > 0
        self._produce = produce
        self._items = iter(items)
        # One thread: items are produced in order, and a result that fails is met in its turn.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._pending: deque[Future[T]] = deque()
        self._submit(depth)

    def next(self) -> T:
        """The next item's result. What ``produce`` raised for it is raised here, with the traceback of the thread.

        Not to be called more often than there are items.
        """
        first = self._pending.popleft()
        self._submit(1)  # before the wait, so that the thread never idles while its queue has room
        return first.result()

    def close(self) -> None:
        """Stop the thread and wait for it; at most one ``produce`` call is waited for."""
        self._thread.shutdown(cancel_futures=True)

    def _submit(self, count: int) -> None:
        self._pending.extend(self._thread.submit(self._produce, item) for item in islice(self._items, count))


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, and the sample ids of the whole."""

    tokens: torch.Tensor
    """int64 [sequences of the rank, seq_len], on the CPU."""

    labels: torch.Tensor
    """int64, like ``tokens``: the token that follows each, also at a cut."""

    samples: npt.NDArray[np.int64]
    """[sequences of the global batch] dataset sample in which each sequence begins."""

    offsets: npt.NDArray[np.int64]
    """[sequences of the global batch] position of its first token in that sample."""


@dataclass(frozen=True)
class _Assembler:
    """Makes batches out of samples. Shared with the prefetch thread, so it must stay without state."""

    dataset: Samples
    seq_len: int
    tail: Tail
    rank: int
    ranks: int
    pin_memory: bool
    skipped: SkippedSamples

    def batch(self, step: PlannedStep) -> Batch:
        # The global batch is computed on every rank and cut afterwards: the records name the samples of all ranks.
        slices = self.skipped.applied(batch_slices(step, seq_len=self.seq_len, tail=self.tail))
        block = rank_block(slices, self.rank, self.ranks)

        self.dataset.check_files()
        # New memory each time, since the copy to the device may still read from the batch before.
        rows = np.empty((2, len(block), step.seq_len), dtype=np.int64)  # tokens and labels, [2, rank's sequences, s]
        for row in range(len(block)):
            offset = int(block.offsets[row])
            here = min(step.seq_len, self.seq_len - offset)
            _read(self.dataset, int(block.samples[row]), offset, rows[:, row, :here])
            if here < step.seq_len:  # recycle: the stream goes on in its next sample
                _read(self.dataset, int(block.next_samples[row]), 0, rows[:, row, here:])
        _check_ids(self.dataset, rows, np.append(block.samples, block.next_samples))

        tokens, labels = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
        if self.pin_memory:  # here, in the thread: pinning copies the batch
            tokens, labels = tokens.pin_memory(), labels.pin_memory()
        return Batch(tokens=tokens, labels=labels, samples=slices.samples, offsets=slices.offsets)


@dataclass(frozen=True)
class _Prefetched:
    step: PlannedStep
    batch: Batch


class TrainLoader:
    """Batches of a plan for one data-parallel rank, prepared ahead by a thread. Use it as a context manager.

    ``batch`` may be called for any step in any order. Steps in order are found prepared; another order, or a step that
    differs from the plan's (because the plan was changed as the run went), costs the preparation of one batch.
    """

    def __init__(
        self,
        dataset: Samples,
        plan: TrainingPlan,
        *,
        data_rank: int = 0,
        data_size: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        """Prepare ``prefetch`` steps ahead (0: none) for rank ``data_rank`` of ``data_size``.

        Raises:
            UserError: a batch size of the plan does not divide by ``data_size``.
        """
        assert dataset.seq_len == plan.seq_len
        assert len(dataset) >= plan.samples
        check_batches_divide(plan, data_size)  # now, not when the step comes
        self._plan = plan
        self._depth = prefetch
        self._ahead: Prefetcher[_Prefetched] | None = None
        self._ahead_step = -1
        self._assembler = _Assembler(
            dataset=dataset,
            seq_len=plan.seq_len,
            tail=plan.tail,
            rank=data_rank,
            ranks=data_size,
            pin_memory=pin_memory,
            skipped=SkippedSamples.none(len(dataset), plan),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the thread. The loader may be used again, which starts another."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def follow(self, plan: TrainingPlan) -> None:
        """Take another version of the plan for the steps to come.

        What was prepared ahead is dropped, so that the next step costs the preparation of its batch.
        """
        if plan is self._plan:
            return
        assert plan.samples <= len(self._assembler.dataset), "the plan outgrew its dataset"
        self._plan = plan
        self.close()

    @property
    def skipped(self) -> SkippedSamples:
        """Samples that are passed over; none at first."""
        return self._assembler.skipped

    def skip(self, skipped: SkippedSamples) -> None:
        """Pass over other samples than before in the steps to come. What was prepared ahead is dropped."""
        if skipped == self.skipped:
            return
        self.close()
        self._assembler = replace(self._assembler, skipped=skipped)

    def batch(self, step: PlannedStep) -> Batch:
        """This rank's batch of ``step``, in memory that nothing else uses. Raises what reading the data raised."""
        if not self._depth:
            return self._assembler.batch(step)
        if self._ahead is not None and self._ahead_step == step.step < self._plan.steps:
            try:
                found = self._ahead.next()
            except BaseException:
                self.close()
                raise
            self._ahead_step += 1
            # The step that is asked for may be of a newer plan than the one the thread worked from.
            if _same_batch(found.step, step):
                return found.batch
        # The thread is sent to the steps after this one, and this one is made here meanwhile.
        self._restart_after(step.step)
        return self._assembler.batch(step)

    def _restart_after(self, step: int) -> None:
        self.close()
        plan, assembler = self._plan, self._assembler

        def produce(index: int) -> _Prefetched:
            planned = plan[index]
            return _Prefetched(step=planned, batch=assembler.batch(planned))

        self._ahead_step = step + 1
        if self._ahead_step < plan.steps:
            self._ahead = Prefetcher(produce, range(self._ahead_step, plan.steps), depth=self._depth)


@dataclass(frozen=True)
class ValidationBatch:
    """One micro-batch of a validation."""

    tokens: torch.Tensor
    """int64 [sequences, seq_len], on the CPU."""

    labels: torch.Tensor
    """int64, like ``tokens``: the token that follows each."""

    weights: torch.Tensor
    """float32 [sequences]: 1, or 0 for a sequence that only fills up the rank's number and must not count."""


@dataclass(frozen=True)
class ValidationLoader:
    """All samples of a dataset once, in the same order each time, as this rank's micro-batches.

    Every rank has the same number of micro-batches of the same sizes, as ZeRO-3 needs it (its ranks gather parameters
    together): ceil(samples / data_size) sequences, the last ones of weight 0 where the samples do not divide evenly.
    Over all ranks the weights add up to the number of samples.
    """

    dataset: Samples
    """Full-length sequences."""

    micro_batch_tokens: int
    """Tokens a micro-batch may hold; at least ``dataset.seq_len``."""

    data_rank: int = 0
    """This rank among the data-parallel ranks."""

    data_size: int = 1
    """Data-parallel ranks."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sequences of each micro-batch, the same on every rank."""
        per_rank = -(-len(self.dataset) // self.data_size)
        return micro_batch_sizes(per_rank, self.dataset.seq_len, self.micro_batch_tokens)

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[ValidationBatch]:
        first = self.data_rank * sum(self.sizes)  # ranks read contiguous blocks, as in training
        for size in self.sizes:
            yield self._micro_batch(first, size)
            first += size

    def _micro_batch(self, first: int, size: int) -> ValidationBatch:
        self.dataset.check_files()
        last = len(self.dataset) - 1
        rows = np.empty((2, size, self.dataset.seq_len), dtype=np.int64)
        # Beyond the last sample it is read again, with weight 0.
        for row in range(size):
            _read(self.dataset, min(first + row, last), 0, rows[:, row])
        _check_ids(self.dataset, rows, np.minimum(np.arange(first, first + size), last))
        weights = (np.arange(first, first + size) <= last).astype(np.float32)
        return ValidationBatch(
            tokens=torch.from_numpy(rows[0]), labels=torch.from_numpy(rows[1]), weights=torch.from_numpy(weights)
        )


def _read(dataset: Samples, sample: int, offset: int, into: npt.NDArray[np.int64]) -> None:
    """Read a sample's tokens from ``offset`` on, and those one further on as labels, into [2, length]."""
    # One token more than asked for, so that the last label is the corpus's next token also at a cut.
    tokens = dataset.read(sample, offset, into.shape[1] + 1)  # [length + 1]
    into[0] = tokens[:-1]
    into[1] = tokens[1:]


def _check_ids(dataset: Samples, rows: npt.NDArray[np.int64], samples: npt.NDArray[np.int64]) -> None:
    """Raise UserError where an id in ``rows``, read from ``samples``, has no row in the model's embedding.

    A damaged file, whose sidecar was believed at the start; padding rows would train on it without a word.
    """
    # As unsigned numbers, of which the negative ones are the largest: one pass over the batch.
    if rows.view(np.uint64).max(initial=0) >= dataset.vocab_size:
        from megatron_ext.data.verify import refuse_ids

        refuse_ids(dataset, samples.tolist())


def _same_batch(made: PlannedStep, wanted: PlannedStep) -> bool:
    """Whether two versions of a step read the same tokens; the learning rate may differ."""
    fields = ("step", "batch_size", "seq_len", "consumed_tokens", "consumed_samples")
    return all(getattr(made, name) == getattr(wanted, name) for name in fields)
