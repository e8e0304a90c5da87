"""From finished steps to train records: the one place where values leave the device."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_ext.config.training import MetricsConfig
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.data.loader import Batch
from megatron_ext.engine.engine import StepResult
from megatron_ext.metrics.pending import FetchedStep, PendingSteps
from megatron_ext.metrics.recorder import Recorder
from megatron_ext.metrics.records import TrainRecord
from megatron_ext.runtime.clock import Mark, seconds_between


@dataclass(frozen=True)
class Measures:
    """What turns raw values into metrics."""

    loss_ratio: Callable[[float], float]
    """Loss of a step -> its loss ratio; called once a step, in order."""

    flops: Callable[[PlannedStep], float]
    """FLOPs that the model needs for a step, forward and backward, over all ranks."""

    peak_flops: float
    """Peak FLOPs per second of all ranks together; 0 where it is not known."""


@dataclass(frozen=True)
class _Finished:
    planned: PlannedStep
    result: StepResult
    micro_batches: tuple[int, ...]
    batch: Batch | None
    start: Mark
    end: Mark


class StepLog:
    """Collects steps while their values are on the device, and records them every ``flush_every`` steps."""

    def __init__(self, recorder: Recorder, measures: Measures, config: MetricsConfig) -> None:
        self._recorder = recorder
        self._measures = measures
        self._flush_every = config.flush_every
        self._keep_sample_ids = config.keep_sample_ids
        self._pending: PendingSteps[_Finished] = PendingSteps()

    def add(
        self,
        planned: PlannedStep,
        result: StepResult,
        *,
        micro_batches: tuple[int, ...],
        batch: Batch,
        start: Mark,
        end: Mark,
    ) -> None:
        """Take a finished step; ``micro_batches`` are one rank's sizes, ``batch`` is what it read."""
        kept = batch if self._keep_sample_ids else None
        finished = _Finished(planned, result, micro_batches, kept, start, end)
        self._pending.add(finished, loss=result.loss, grad_norm=result.grad_norm, prefix_loss=result.prefix_loss)
        if len(self._pending) >= self._flush_every:
            self.flush()

    def flush(self) -> None:
        """Record all steps that are still waiting; waits for the device."""
        for step in self._pending.drain():
            self._recorder.train(self._record(step))

    def _record(self, step: FetchedStep[_Finished]) -> TrainRecord:
        finished, planned = step.info, step.info.planned
        seconds = seconds_between(finished.start, finished.end)
        peak = self._measures.peak_flops
        batch = finished.batch
        return TrainRecord(
            step=planned.step + 1,
            tokens=planned.consumed_tokens + planned.tokens,
            samples=planned.consumed_samples + planned.batch_size,
            seq_len=planned.seq_len,
            batch_size=planned.batch_size,
            micro_batch_size=max(finished.micro_batches),
            micro_batches=len(finished.micro_batches),
            lr=planned.lr,
            loss=step.loss,
            loss_ratio=self._measures.loss_ratio(step.loss),
            grad_norm=step.grad_norm,
            step_time_s=seconds,
            tokens_per_s=planned.tokens / seconds,
            mfu=self._measures.flops(planned) / (seconds * peak) if peak else None,
            skipped=finished.result.skipped,
            prefix_loss=step.prefix_loss,
            sample_ids=None if batch is None else tuple(batch.samples.tolist()),
            offsets=None if batch is None else tuple(batch.offsets.tolist()),
        )
