"""The training run: the order of events, and nothing else."""

from pathlib import Path

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.adaptive import AdaptiveCourse, Decision
from megatron_ext.curriculum.intervals import is_due
from megatron_ext.curriculum.plan import PlannedStep
from megatron_ext.curriculum.sampler import micro_batch_sizes
from megatron_ext.engine.micro_batches import MicroBatch, cut_micro_batches
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.runtime.device import Device, mark
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes, StopAgreement
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.session import Run, roll_back, set_up, stop_for


def train(config: RunConfig, *, device: Device, processes: Processes, stop: StopRequest) -> bool:
    """Train as one of the ranks in ``processes``, from the newest checkpoint or the beginning to the end of the plan.

    Returns:
        Whether the run got to where it should; false where ``stop`` asked to end it before, with a checkpoint saved.

    Raises:
        UserError: data, checkpoint or layout do not fit the config.
        GuardStop: a guard of the config ended the run.
    """
    with set_up(config, device=device, processes=processes) as run:
        return run_loop(run, stop)


def run_loop(run: Run, stop: StopRequest) -> bool:
    """Train from ``run.first_step`` to ``training.stop_after`` or the end of the plan, or until a rank has to stop.

    Returns whether it came to the end.
    """
    config, step = run.config, run.first_step
    stopping = StopAgreement(run.processes)
    while step < run.last_step:
        planned = run.plan[step]
        stopping.ask(stop.requested)
        start = mark(run.device)
        batch = run.loader.batch(planned)
        sizes = micro_batch_sizes(len(batch.tokens), planned.seq_len, config.micro_batch_tokens)
        pieces = cut_micro_batches(batch.tokens, batch.labels, sizes)
        result = run.engine.step(pieces, global_tokens=planned.tokens, lr=planned.lr, judge=run.guard)
        result = run.variance.measured(planned, result)
        run.log.add(planned, result, micro_batches=sizes, batch=batch, start=start, end=mark(run.device))
        step, stopped = step + 1, stopping.answer()
        if (back := heed_guard(run, planned)) is not None:
            step = back
            continue
        pace(run, planned)
        finished = step == run.last_step
        if finished or is_due(config.validation.every, planned):
            validate(run, planned)
        if finished or stopped or is_due(config.checkpoint.every, planned):
            save(run, planned)
        if stopped and not finished:
            run.recorder.event("preemption", step=step, tokens=planned.consumed_tokens + planned.tokens)
            LOGGER.info("stopped after step %d of %d on request; start again to continue", step, run.plan.steps)
            return False
    if run.first_step >= run.plan.steps:
        LOGGER.info("step %d of %d: the run is finished, there is nothing left to train", step, run.plan.steps)
    if step < run.plan.steps:
        LOGGER.info("step %d of %d: the run goes on when training.stop_after is later or null", step, run.plan.steps)
    return True


def pace(run: Run, after: PlannedStep) -> None:
    """Let adaptive pacing decide on the length after a step, before a checkpoint of that step is written."""
    course = run.course
    if not isinstance(course, AdaptiveCourse) or not course.due(after):
        return
    run.log.flush()
    # One rank decides, so that no difference in the last bit of a loss can part the ranks.
    decision = run.processes.agree_from_main(course.decide(after))
    assert isinstance(decision, Decision)
    course.follow(decision)
    run.loader.follow(course.plan)
    run.recorder.event("pacing", step=decision.step, tokens=after.consumed_tokens + after.tokens, **decision.details())


def validate(run: Run, after: PlannedStep) -> None:
    """Record the loss at full length after a step."""
    run.log.flush()
    losses = run.engine.evaluate((MicroBatch(b.tokens, b.labels), b.weights) for b in run.validation).numpy()
    tokens, buckets = after.consumed_tokens + after.tokens, run.config.validation.position_buckets
    run.recorder.evaluation(EvalRecord.from_positions(losses, step=after.step + 1, tokens=tokens, buckets=buckets))


def save(run: Run, after: PlannedStep) -> Path | None:
    """Write a checkpoint after a step; with guards on, None and no checkpoint where weights are not finite."""
    run.log.flush()
    step, tokens = after.step + 1, after.consumed_tokens + after.tokens
    if run.guard is not None and not run.engine.weights_finite():
        run.recorder.event("guard", step=step, tokens=tokens, action="no checkpoint", reason="weights")
        return None
    path = run.checkpointer.save(
        step=step,
        tokens=tokens,
        loss_ratio=run.loss_ratio.state_dict(),
        curriculum=run.course.state_dict(),
        guard=None if run.guard is None else run.guard.state_dict(),
        skipped_samples=run.loader.skipped.to_json(),
    )
    run.recorder.event("checkpoint", step=step, tokens=tokens, path=str(path))
    return path


def heed_guard(run: Run, after: PlannedStep) -> int | None:
    """Do what the guard says about a step; the step to go on with, where that is not the next one.

    Raises:
        GuardStop: the run has to end.
    """
    verdict = None if run.guard is None else run.guard.verdict
    if verdict is None:
        return None
    run.log.flush()
    tokens = after.consumed_tokens + after.tokens
    run.recorder.event("guard", step=after.step + 1, tokens=tokens, **verdict.details())
    if verdict.action == "rollback":
        return roll_back(run, after, verdict)
    if verdict.action == "stop":
        raise stop_for(run, after, verdict, saved=save(run, after) if verdict.saves else None)
    return None
