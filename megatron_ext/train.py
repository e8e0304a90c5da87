"""The training run: the order of events, and nothing else."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_ext.checkpoint.checkpointer import Checkpointer
from megatron_ext.checkpoint.manifest import Manifest
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.adaptive import AdaptiveCourse, Decision, open_course
from megatron_ext.curriculum.course import Course
from megatron_ext.curriculum.intervals import is_due
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.sampler import micro_batch_sizes
from megatron_ext.curriculum.skips import positions_between
from megatron_ext.data.datasets import build_datasets
from megatron_ext.data.loader import TrainLoader, ValidationLoader
from megatron_ext.engine.engine import TrainEngine
from megatron_ext.engine.micro_batches import MicroBatch, cut_micro_batches
from megatron_ext.metrics.observer import CourseObserver
from megatron_ext.metrics.positions import prefix_length
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.metrics.step_log import Measures, StepLog
from megatron_ext.model.counts import step_flops
from megatron_ext.model.gpt import build_gpt
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.clock import mark
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes, StopAgreement
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.stability.adam_variance import AdamVariance
from megatron_ext.stability.guard import GuardStop, UpdateGuard, Verdict
from megatron_ext.stability.loss_ratio import LossRatio


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank, built and at the step from which it goes on."""

    config: RunConfig
    course: Course
    device: Device
    processes: Processes
    engine: TrainEngine
    loader: TrainLoader
    validation: ValidationLoader
    checkpointer: Checkpointer
    loss_ratio: LossRatio
    guard: UpdateGuard | None
    variance: AdamVariance
    recorder: Recorder
    log: StepLog
    first_step: int

    @property
    def plan(self) -> TrainingPlan:
        """The plan as it stands."""
        return self.course.plan

    @property
    def last_step(self) -> int:
        """Finished steps with which the loop ends, as the plan stands."""
        return self.plan.steps_within(self.config.training.stop_after)


def train(config: RunConfig, *, device: Device, processes: Processes, stop: StopRequest) -> None:
    """Train as one of the ranks in ``processes``, from the newest checkpoint or the beginning to the end of the plan.

    Returns early, with a checkpoint saved, where ``stop`` asks for it.

    Raises:
        UserError: data, checkpoint or layout do not fit the config.
        GuardStop: a guard of the config ended the run.
    """
    with set_up(config, device=device, processes=processes) as run:
        run_loop(run, stop)


def run_loop(run: Run, stop: StopRequest) -> None:
    """Train from ``run.first_step`` to ``training.stop_after`` or the end of the plan, or until a rank has to stop."""
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
            return
    if step < run.plan.steps:
        LOGGER.info("step %d of %d: the run goes on when training.stop_after is later or null", step, run.plan.steps)


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


def roll_back(run: Run, after: PlannedStep, verdict: Verdict) -> int:
    """Go back to before an incident, skip the samples read since, and return the step to go on with."""
    assert run.guard is not None
    checkpoint = run.checkpointer.newest(not_after=after.step + 1 - verdict.steps)
    if checkpoint is None:
        raise stop_for(run, after, replace(verdict, limit="there is no checkpoint from before it to roll back to"))
    manifest = run.checkpointer.load(checkpoint)
    skipped = run.loader.skipped.without(positions_between(run.plan, manifest.step, after.step))
    if skipped.left < after.batch_size:
        raise stop_for(run, after, replace(verdict, limit="rolling back would leave no sample to read"))
    more = run.loader.skipped.left - skipped.left
    run.loss_ratio.load_state_dict(manifest.loss_ratio)
    run.guard.roll_back(manifest.guard, manifest.loss_ratio)
    run.course.load_state_dict(manifest.curriculum)
    run.loader.follow(run.plan)
    run.loader.skip(skipped)
    run.recorder.roll_back(step=manifest.step, tokens=manifest.tokens)
    # From here on a run that is killed goes on as this one does.
    state = replace(manifest, guard=run.guard.state_dict(), skipped_samples=skipped.to_json())
    run.checkpointer.go_on_from(checkpoint, state)
    place = {"from_step": after.step + 1, "to_step": manifest.step, "tokens": manifest.tokens}
    run.recorder.event("rollback", **place, skipped_samples=more, checkpoint=str(checkpoint))
    return manifest.step


def stop_for(run: Run, after: PlannedStep, verdict: Verdict, *, saved: Path | None = None) -> GuardStop:
    """The end of a run that a guard stops: what happened, what is left, what to do."""
    newest = saved or run.checkpointer.newest()
    left = f"{newest} is the newest checkpoint" if newest else "there is no checkpoint"
    if saved:
        left = f"{saved} holds the weights without that step's update; start again to go on with the next step"
    why = f"{verdict.why}; {verdict.limit}" if verdict.limit else verdict.why
    return GuardStop(f"a guard stopped the run at step {after.step + 1:,}: {why}. {left}, or change guards first")


@contextmanager
def set_up(config: RunConfig, *, device: Device, processes: Processes) -> Iterator[Run]:
    """Build everything in the order in which mistakes are cheapest to find, and take it down again."""
    course = open_course(config)
    plan = course.plan
    layout = initialize_parallel(config.parallel.tensor, config.parallel.timeout_minutes)
    try:
        datasets = build_datasets(config, plan)
        place = {"data_rank": layout.data_rank, "data_size": layout.data_size}
        loader = TrainLoader(datasets.train, plan, prefetch=config.data.prefetch, pin_memory=device.pin_memory, **place)
        validation = ValidationLoader(datasets.valid, config.micro_batch_tokens, **place)
        streams = seed_streams(config.seed, layout, device.torch_device)
        model, prefix = build_gpt(config, layout, streams), prefix_length(config, plan)
        engine = TrainEngine(config, model, layout=layout, device=device, prefix=prefix)
        checkpointer = Checkpointer(config, engine, streams=streams, layout=layout, processes=processes)
        resumed = checkpointer.resume() if config.checkpoint.resume else None
        loss_ratio = LossRatio()
        guard = UpdateGuard(config.guards) if config.guards.are_on else None
        if resumed is not None:
            loss_ratio.load_state_dict(resumed.loss_ratio)
            course.load_state_dict(resumed.curriculum)
            loader.follow(course.plan)
            loader.skip(loader.skipped.with_ranges(resumed.skipped_samples))
            if guard is not None:
                guard.load_state_dict(resumed.guard, resumed.loss_ratio)
        recorder = open_recorder(config, course, resumed=resumed, processes=processes)
        variance = AdamVariance(engine, config.metrics, device.torch_device)
        measures = Measures(
            loss_ratio=loss_ratio.update,
            adam_variance=variance.summary,
            flops=lambda s: step_flops(config.model, batch_size=s.batch_size, seq_len=s.seq_len),
            peak_flops=config.metrics.peak_tflops * 1e12 * processes.info.world_size,
        )
        log = StepLog(recorder, measures, config.metrics)
        with closing(recorder), loader:
            yield Run(
                config=config,
                course=course,
                device=device,
                processes=processes,
                engine=engine,
                loader=loader,
                validation=validation,
                checkpointer=checkpointer,
                loss_ratio=loss_ratio,
                guard=guard,
                variance=variance,
                recorder=recorder,
                log=log,
                first_step=resumed.step if resumed else 0,
            )
            log.flush()
    finally:
        destroy_parallel()


def open_recorder(config: RunConfig, course: Course, *, resumed: Manifest | None, processes: Processes) -> Recorder:
    """Open the run's metrics on rank 0 and write down what is being run; the other ranks get one that keeps nothing."""
    if not processes.info.is_main:
        return Recorder()
    step, tokens = (resumed.step, resumed.tokens) if resumed else (0, 0)
    plan = course.plan
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.json").write_text(json.dumps(config.model_dump(mode="json"), indent=1) + "\n")
    (config.run_dir / "plan.json").write_text(json.dumps(course.to_json(), indent=1) + "\n")
    sinks = open_sinks(
        config.run_dir,
        config.metrics,
        total_tokens=plan.tokens_at_step(plan.steps_within(config.training.stop_after)),
        step=step,
        tokens=tokens,
        console=Console(stderr=True),
    )
    recorder = Recorder([*sinks, CourseObserver(course)])
    recorder.event("resume" if resumed else "start", step=step, tokens=tokens, world_size=processes.info.world_size)
    return recorder
