"""From finished steps to train records: the one place where values leave the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_ext.config.training import MetricsConfig
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.data.loader import Batch
from megatron_ext.engine.engine import StepResult
from megatron_ext.metrics.pending import FetchedStep, PendingSteps
from megatron_ext.metrics.recorder import Recorder
from megatron_ext.metrics.records import TrainRecord
from megatron_ext.runtime.device import Mark, seconds_between


class VarianceSummary(Protocol):
    """What is recorded of a measurement of Adam's variance."""

    @property
    def l1(self) -> float:
        """l1 norm of sqrt(v) over all parameters."""

    @property
    def largest(self) -> float:
        """Largest element of sqrt(v)."""

    @property
    def layers(self) -> Mapping[str, tuple[float, float]]:
        """Both, of each layer."""

    @property
    def kinds(self) -> Mapping[str, tuple[float, float]]:
        """Both, of each kind of parameter."""


@dataclass(frozen=True)
class Measures:
    """What turns raw values into metrics."""

    loss_ratio: Callable[[float], float]
    """Loss of a step -> its loss ratio; called once a step, in order."""

    adam_variance: Callable[[Sequence[float]], VarianceSummary]
    """Fetched values of a measurement of Adam's variance -> what they say."""

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
        self._variance_detail = config.adam_variance_detail
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
        self._pending.add(
            finished,
            loss=result.loss,
            grad_norm=result.grad_norm,
            prefix_loss=result.prefix_loss,
            adam_variance=result.adam_variance,
        )
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
        variance = None if step.adam_variance is None else self._measures.adam_variance(step.adam_variance)
        detail = {"layers": variance.layers, "kinds": variance.kinds} if variance and self._variance_detail else None
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
            adam_var_l1=variance.l1 if variance else None,
            adam_var_max=variance.largest if variance else None,
            adam_var=detail,
            sample_ids=None if batch is None else tuple(batch.samples.tolist()),
            offsets=None if batch is None else tuple(batch.offsets.tolist()),
        )
