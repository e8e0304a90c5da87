"""The training run on one rank: the loop over steps, and what happens between steps.

``train`` is what a rank calls. The loop is a list of events in the order in which they happen; what each of them does
is in the parts, which ``build.py`` makes.
"""

from pathlib import Path

from megatron_ext.build import Run, build_run
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import Decision, PlannedStep, is_due
from megatron_ext.curriculum.sampler import micro_batch_sizes
from megatron_ext.engine.engine import MicroBatch, cut_micro_batches
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.metrics.step_log import FinishedStep, train_record
from megatron_ext.runtime.device import Device, mark
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes, StopAgreement
from megatron_ext.runtime.signals import StopRequest


def train(config: RunConfig, *, device: Device, processes: Processes, stop: StopRequest) -> bool:
    """Train as one of the ranks in ``processes``, from the newest checkpoint or the beginning to the end of the plan.

    Returns:
        Whether the run got to where it should; false where ``stop`` asked to end it before, with a checkpoint saved.

    Raises:
        UserError: data, checkpoint or layout do not fit the config.
        GuardStop: a guard of the config, or numbers that are not finite, ended the run.
    """
    with build_run(config, device=device, processes=processes) as run:
        return run_loop(run, stop)


def run_loop(run: Run, stop: StopRequest) -> bool:
    """Train from ``run.first_step`` to ``training.stop_after`` or the end of the plan, or until a rank has to stop.

    Returns whether it came to the end.
    """
    config, step = run.config, run.first_step
    stopping = StopAgreement(run.processes)
    while step < run.last_step:
        # Whether a rank was asked to stop travels over gloo while the step computes.
        planned = run.plan[step]
        stopping.ask(stop.requested)
        if run.profiler is not None:
            run.profiler.before(step)
        start = mark(run.device)

        # This rank's block of the global batch, in as few micro-batches as fit: short sequences share one.
        batch = run.loader.batch(planned)  # tokens, labels [sequences, seq_len]
        sizes = micro_batch_sizes(len(batch.tokens), planned.seq_len, config.micro_batch_tokens)
        pieces = cut_micro_batches(batch.tokens, batch.labels, sizes)
        result = run.engine.step(pieces, global_tokens=planned.tokens, lr=planned.lr, policy=run.guard)

        # Values stay on the device until a few steps have gathered, so that no step waits for one.
        info = FinishedStep(
            planned=planned,
            micro_batches=sizes,
            start=start,
            end=mark(run.device),
            loss_ratio=None if run.guard is None else run.guard.ratio,
            peak_memory_bytes=run.device.peak_memory(),
            batch=batch if config.metrics.keep_sample_ids else None,
        )
        run.pending.add(info, result, adam_variance=run.variance.measure_after(planned))
        if len(run.pending) >= config.metrics.flush_every:
            advance_state(run)
        step, stopped = step + 1, stopping.answer()

        # Between steps: the guard, which may go back; the length; validation; checkpoint.
        if (back := follow_guard(run, planned)) is not None:
            step = back
            continue
        if config.guards.check_copies_every and step % config.guards.check_copies_every == 0:
            check_copies(run, planned)
        pace(run, planned)
        finished = step == run.last_step
        if finished or is_due(config.validation.every, planned):
            validate(run, planned)
        if finished or stopped or is_due(config.checkpoint.every, planned):
            save(run, planned)
        if stopped and not finished:
            run.recorder.event("preemption", step=step, tokens=planned.end_tokens)
            LOGGER.info("stopped after step %d of %d on request; start again to continue", step, run.plan.steps)
            return False
    if run.first_step >= run.plan.steps:
        LOGGER.info("step %d of %d: the run is finished, there is nothing left to train", step, run.plan.steps)
    if step < run.plan.steps:
        LOGGER.info("step %d of %d: the run goes on when training.stop_after is later or null", step, run.plan.steps)
    return True


def advance_state(run: Run) -> None:
    """Fetch the steps that are still on the device, advance what depends on their losses, and record them."""
    for step in run.pending.drain():
        # On every rank, in the order of steps: the state is part of the next checkpoint, which rank 0 alone describes.
        variance = None if step.adam_variance is None else run.variance.summary(step.adam_variance)
        ratio = step.info.loss_ratio
        if ratio is None:
            ratio = run.loss_ratio.update(step.loss)
        largest = variance.largest if variance else None
        run.schedule.observe(seq_len=step.info.planned.seq_len, loss=step.loss, variance=largest)
        measured = variance.fields(detail=run.config.metrics.adam_variance_detail) if variance else {}
        run.recorder.train(train_record(step, run.rates, loss_ratio=ratio, variance=measured))
        if step.skipped:
            from megatron_ext.incidents import left_out

            left_out(run, step)
        else:
            run.pending.left_out = 0


def pace(run: Run, after: PlannedStep) -> None:
    """Let adaptive pacing decide on the length after a step, before a checkpoint of that step is written."""
    schedule = run.schedule
    if not schedule.due(after):
        return
    advance_state(run)
    # One rank decides, so that no difference in the last bit of a loss can part the ranks.
    decision = run.processes.agree_from_main(schedule.decide(after))
    assert isinstance(decision, Decision)
    schedule.apply(decision)
    run.loader.follow(schedule.plan)
    run.recorder.event("pacing", step=decision.step, tokens=after.end_tokens, **decision.details())


def validate(run: Run, after: PlannedStep) -> None:
    """Record the loss at full length after a step."""
    advance_state(run)  # records are in the order of events
    losses = run.engine.evaluate((MicroBatch(b.tokens, b.labels), b.weights) for b in run.validation).numpy()
    tokens, buckets = after.end_tokens, run.config.validation.position_buckets
    run.recorder.evaluation(EvalRecord.from_positions(losses, step=after.step + 1, tokens=tokens, buckets=buckets))


def save(run: Run, after: PlannedStep) -> Path | None:
    """Write a checkpoint after a step; None and no checkpoint where weights are not finite."""
    advance_state(run)
    step, tokens = after.step + 1, after.end_tokens
    if not run.engine.weights_finite():
        from megatron_ext.incidents import no_checkpoint

        no_checkpoint(run, after)
        return None
    path = run.checkpointer.save(
        step=step,
        tokens=tokens,
        loss_ratio=run.loss_ratio.state_dict(),
        curriculum=run.schedule.state_dict(),
        guard=({} if run.guard is None else run.guard.state_dict()) | {"left_out": run.pending.left_out},
        skipped_samples=run.loader.skipped.to_json(),
    )
    run.recorder.event("checkpoint", step=step, tokens=tokens, path=str(path))
    return path


def check_copies(run: Run, after: PlannedStep) -> None:
    """Raise GuardStop where ranks that hold the same weights differ in a bit of them."""
    from megatron_ext.incidents import compare_copies

    advance_state(run)
    compare_copies(run, after)


def follow_guard(run: Run, after: PlannedStep) -> int | None:
    """Do what the guard asks for after a step; the step to go on with, where that is not the next one.

    Raises:
        GuardStop: the run has to end.
    """
    if run.guard is None or run.guard.incident is None:
        return None
    from megatron_ext.incidents import act_on

    advance_state(run)
    return act_on(run, after, run.guard.incident, save=save)
