"""Finished steps between the device and the metrics: the one place where values of a step are fetched.

Reading a loss makes the host wait for the device. The loop therefore adds each finished step here with its tensors as
they are, and drains the steps every few of them: one copy from the device then serves them all.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.data.loader import Batch
from megatron_ext.engine.engine import StepResult
from megatron_ext.metrics.records import TrainRecord
from megatron_ext.runtime.device import Mark, seconds_between

Values = torch.Tensor | float | None


@dataclass(frozen=True)
class FinishedStep:
    """What the host knows of a step while its values are still on the device."""

    planned: PlannedStep
    micro_batches: tuple[int, ...]
    """Sequences of each micro-batch of this rank."""

    start: Mark
    end: Mark
    loss_ratio: float | None = None
    """Its loss ratio, where a guard has asked for the loss already."""

    peak_memory_bytes: int | None = None
    """Peak memory of this rank's device during the step."""

    batch: Batch | None = None
    """What the step read, where sample ids are recorded."""


@dataclass(frozen=True, slots=True)
class FetchedStep:
    """A finished step with its values on the host."""

    info: FinishedStep
    loss: float
    """Mean loss, nats per token."""
    grad_norm: float | None
    """Global l2 norm of the gradient; None where it is not known."""
    prefix_loss: float | None = None
    """Mean loss over the first positions of every sequence; None where it was not measured."""
    adam_variance: tuple[float, ...] | None = None
    """What ``AdamVariance.measure`` returned; None where it was not measured."""
    skipped: bool = False
    """Whether the weights were left alone."""


class PendingSteps:
    """Collects finished steps in order, without waiting for the device, until they are drained."""

    def __init__(self, *, left_out: int = 0) -> None:
        """``left_out``: steps in a row, up to the last one fetched, that had no update because of a broken gradient."""
        self.left_out = left_out
        self._infos: list[FinishedStep] = []
        self._scalars: list[Values] = []
        self._vectors: list[torch.Tensor | None] = []

    def __len__(self) -> int:
        return len(self._infos)

    def add(self, info: FinishedStep, result: StepResult, *, adam_variance: torch.Tensor | None = None) -> None:
        """Add a finished step. The result's 0-d tensors are copied, for an engine may reuse its buffers.

        ``adam_variance`` [n] is what ``AdamVariance.measure`` returned after the step, and is kept as it is.
        """
        self._infos.append(info)
        values = (result.loss, result.grad_norm, result.prefix_loss, result.skipped)
        self._scalars += [_copied(value) for value in values]
        self._vectors.append(adam_variance)

    def drain(self) -> list[FetchedStep]:
        """All steps added since the last drain, in order; waits for the device once."""
        tensors = [value for value in [*self._scalars, *self._vectors] if isinstance(value, torch.Tensor)]
        on_host: Iterator[float] = iter(())
        if tensors:
            # float64 holds every element type exactly, and lets tensors of different types share the copy.
            on_host = iter(torch.cat([tensor.reshape(-1).to(torch.float64) for tensor in tensors]).tolist())
        scalars = [next(on_host) if isinstance(value, torch.Tensor) else value for value in self._scalars]
        vectors = [None if vector is None else tuple(islice(on_host, vector.numel())) for vector in self._vectors]
        steps = []
        for index, info in enumerate(self._infos):
            loss, grad_norm, prefix_loss, skipped = scalars[4 * index : 4 * index + 4]
            assert loss is not None, "a step is added with a loss"
            steps.append(FetchedStep(info, loss, grad_norm, prefix_loss, vectors[index], bool(skipped)))
        self._infos, self._scalars, self._vectors = [], [], []
        return steps


@dataclass(frozen=True)
class Utilization:
    """What turns the time of a step into model FLOPs utilization."""

    flops: Callable[[PlannedStep], float]
    """FLOPs that the model needs for a step, forward and backward, over all ranks."""

    peak_flops: float
    """Peak FLOPs per second of all ranks together."""


def train_record(
    step: FetchedStep, rates: Utilization | None, *, loss_ratio: float, variance: Mapping[str, Any]
) -> TrainRecord:
    """The line of a step in the metrics.

    Args:
        step: The step, after which marks of the clock have been reached.
        rates: The run's; None: utilization is not known.
        loss_ratio: Its loss ratio.
        variance: Fields of the record about Adam's variance; empty where it was not measured.
    """
    info, planned = step.info, step.info.planned
    seconds = seconds_between(info.start, info.end)
    return TrainRecord(
        step=planned.step + 1,
        tokens=planned.consumed_tokens + planned.tokens,
        samples=planned.consumed_samples + planned.batch_size,
        seq_len=planned.seq_len,
        batch_size=planned.batch_size,
        micro_batch_size=max(info.micro_batches),
        micro_batches=len(info.micro_batches),
        lr=planned.lr,
        loss=step.loss,
        loss_ratio=loss_ratio,
        grad_norm=step.grad_norm,
        step_time_s=seconds,
        tokens_per_s=planned.tokens / seconds,
        mfu=None if rates is None else rates.flops(planned) / (seconds * rates.peak_flops),
        skipped=step.skipped,
        prefix_loss=step.prefix_loss,
        peak_memory_bytes=info.peak_memory_bytes,
        sample_ids=None if info.batch is None else _tuple(info.batch.samples),
        offsets=None if info.batch is None else _tuple(info.batch.offsets),
        **variance,
    )


def _tuple(values: Any) -> tuple[int, ...]:
    return tuple(values.tolist())


def _copied(value: Values) -> Values:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value
