"""How far a run is and what becomes of it, read off its directory and the queue: for ``status`` and ``experiment``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.launch.slurm import FOLDER, UNKNOWN, JobRecord, QueuedJob, has_slurm, jobs_of, queue
from megatron_ext.runtime.run_lock import is_locked

if TYPE_CHECKING:
    import numpy.typing as npt


State = Literal["waiting", "queued", "running", "interrupted", "failed", "finished"]

_RECENT_STEPS = 50


@dataclass(frozen=True)
class Progress:
    """What a run's directory says of its training."""

    step: int  # finished steps, of those that metrics.jsonl holds
    steps: int  # steps with which the run ends: of the plan, or where ``training.stop_after`` ends it
    tokens: int  # tokens consumed
    total_tokens: int  # tokens at the end
    loss: float | None  # of the last step, in nats per token
    valid_loss: float | None  # the last validation loss
    largest_ratio: float | None  # the largest loss ratio; infinite after a loss that was not finite
    seconds: float  # time spent in steps
    tokens_per_s: float | None  # over the last 50 steps
    checkpoint: Path | None  # the newest complete one
    finished: bool  # whether a checkpoint or a validation stands at the end

    @property
    def eta_seconds(self) -> float | None:
        """Time that the rest takes at the recent speed, validations and checkpoints not counted."""
        if self.finished:
            return 0.0
        return (self.total_tokens - self.tokens) / self.tokens_per_s if self.tokens_per_s else None


@dataclass(frozen=True)
class Situation:
    """What becomes of a run."""

    state: State
    note: str = ""  # why it failed
    record: JobRecord | None = None  # its last job, of those that its directory remembers
    queued: QueuedJob | None = None  # that job in the queue, if it is there


def read_progress(config: RunConfig, plan: TrainingPlan) -> Progress:
    """How far the run is. Raises UserError if a file in its directory cannot be read."""
    from megatron_ext.checkpoint.store import newest_checkpoint
    from megatron_ext.metrics.reading import read_columns
    from megatron_ext.metrics.records import FILE_NAME

    file = config.run_dir / FILE_NAME
    names = ("step", "tokens", "loss", "loss_ratio", "step_time_s", "tokens_per_s")
    none: npt.NDArray[np.float64] = np.empty(0)
    train, evaluations = dict.fromkeys(names, none), dict.fromkeys(("step", "tokens", "loss"), none)
    if file.is_file():
        train = read_columns(file, names)
        evaluations = read_columns(file, ("step", "tokens", "loss"), kind="eval")
    seconds = train["step_time_s"][-_RECENT_STEPS:]
    spent = float(seconds.sum())
    checkpoint = newest_checkpoint(config.run_dir / "checkpoints")
    last_step = plan.steps_within(config.training.stop_after)
    return Progress(
        step=int(_last(train["step"]) or 0),
        steps=last_step,
        tokens=int(_last(train["tokens"]) or 0),
        total_tokens=plan.tokens_at_step(last_step),
        loss=_last(train["loss"]),
        valid_loss=_last(evaluations["loss"]),
        largest_ratio=float(train["loss_ratio"].max()) if len(train["loss_ratio"]) else None,
        seconds=float(train["step_time_s"].sum()),
        tokens_per_s=float((train["tokens_per_s"][-_RECENT_STEPS:] * seconds).sum()) / spent if spent > 0 else None,
        checkpoint=checkpoint,
        finished=_is_finished(config, checkpoint, evaluations),
    )


def _last(column: "npt.NDArray[np.float64]") -> float | None:
    return float(column[-1]) if len(column) else None


def _is_finished(
    config: RunConfig, checkpoint: Path | None, evaluations: "Mapping[str, npt.NDArray[np.float64]]"
) -> bool:
    """Whether a checkpoint or a validation stands at the end of the run, or where ``training.stop_after`` ends it."""
    from megatron_ext.checkpoint.verify import read_manifest

    reached: list[tuple[float, float]] = []
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        reached.append((manifest.step, manifest.tokens))
    if len(evaluations["step"]):
        reached.append((evaluations["step"][-1], evaluations["tokens"][-1]))
    ends = [end for end in (config.training.duration, config.training.stop_after) if end is not None]
    # Compared with the duration, not with the plan's steps: those of adaptive pacing become known on the way.
    return any(
        step >= end.steps if end.steps is not None else tokens >= (end.tokens or 0)
        for step, tokens in reached
        for end in ends
    )


def situations(runs: Sequence[tuple[Path, Progress]]) -> list[Situation]:
    """What becomes of each run, from its directory, the lock in it, and one question to the queue."""
    records = [jobs_of(run_dir) for run_dir, _ in runs]
    asked = [job.job for jobs in records for job in jobs if job.may_be_queued]
    queued = queue(asked) if asked and has_slurm() else {}
    return [
        _situation(run_dir, progress, jobs, queued) for (run_dir, progress), jobs in zip(runs, records, strict=True)
    ]


def _situation(
    run_dir: Path, progress: Progress, jobs: Sequence[JobRecord], queue: Mapping[str, QueuedJob]
) -> Situation:
    # Of a chain the first that is still there: the others wait for it.
    alive = [job for job in jobs if job.job in queue and not queue[job.job].is_over]
    last = alive[0] if alive else jobs[-1] if jobs else None
    queued = queue.get(last.job) if last is not None and alive else None
    if queued is not None and queued.state == "PENDING":
        return Situation("finished" if progress.finished else "queued", record=last, queued=queued)
    if (queued is not None and queued.state != UNKNOWN) or is_locked(run_dir):
        return Situation("running", record=last, queued=queued)
    if progress.finished:
        return Situation("finished", record=last)
    if last is not None and last.failed:
        return Situation("failed", f"job {last.job}: exit status {last.status}; {run_dir / FOLDER}", last)
    if last is not None and last.event == "submitted" and queued is None and queue:
        return Situation("failed", f"job {last.job} left the queue without having begun", last)
    return Situation("interrupted" if progress.step else "waiting", record=last, queued=queued)
