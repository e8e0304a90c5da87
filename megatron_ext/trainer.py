"""A training run on one rank: its parts built in order, the loop over steps, and what happens between steps.

``train`` is what a rank calls. ``build_run`` makes the parts; each can be built without the others, too. The loop is a
list of events in the order in which they happen; what each of them does is in the parts.
"""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.store import Manifest
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.adaptive import AdaptiveCourse, Decision, open_course
from megatron_ext.curriculum.course import Course
from megatron_ext.curriculum.intervals import is_due
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.sampler import micro_batch_sizes
from megatron_ext.curriculum.skips import positions_between
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import TrainLoader, ValidationLoader
from megatron_ext.engine.deepspeed_config import EngineSettings
from megatron_ext.engine.deepspeed_engine import DeepSpeedEngine
from megatron_ext.engine.engine import Engine, MicroBatch, cut_micro_batches
from megatron_ext.metrics.positions import prefix_length
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.records import EvalRecord
from megatron_ext.metrics.step_log import FinishedStep, PendingSteps, Rates, train_record
from megatron_ext.model.counts import step_flops
from megatron_ext.model.gpt import build_gpt
from megatron_ext.ops.kernels import Kernels, choose_kernels
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.runtime.clock import mark
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.files import replace_text
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes, StopAgreement
from megatron_ext.runtime.profiler import StepProfiler
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.stability.adam_variance import AdamVariance
from megatron_ext.stability.guard import GuardStop, UpdateGuard, Verdict
from megatron_ext.stability.loss_ratio import LossRatio


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank, at the step from which it goes on."""

    config: RunConfig
    course: Course
    device: Device
    processes: Processes
    engine: Engine
    loader: TrainLoader
    validation: ValidationLoader
    checkpointer: Checkpointer
    loss_ratio: LossRatio
    guard: UpdateGuard | None
    variance: AdamVariance
    pending: PendingSteps
    rates: Rates
    recorder: Recorder
    profiler: StepProfiler | None
    first_step: int

    @property
    def plan(self) -> TrainingPlan:
        """The plan as it stands."""
        return self.course.plan

    @property
    def last_step(self) -> int:
        """Finished steps with which the loop ends, as the plan stands."""
        return self.plan.steps_within(self.config.training.stop_after)


def train(config: RunConfig, *, device: Device, processes: Processes, stop: StopRequest) -> bool:
    """Train as one of the ranks in ``processes``, from the newest checkpoint or the beginning to the end of the plan.

    Returns:
        Whether the run got to where it should; false where ``stop`` asked to end it before, with a checkpoint saved.

    Raises:
        UserError: data, checkpoint or layout do not fit the config.
        GuardStop: a guard of the config ended the run.
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
            skipped=result.skipped,
            peak_memory_bytes=run.device.peak_memory(),
            batch=batch if config.metrics.keep_sample_ids else None,
        )
        run.pending.add(
            info,
            loss=result.loss,
            grad_norm=result.grad_norm,
            prefix_loss=result.prefix_loss,
            adam_variance=run.variance.measure_after(planned),
        )
        if len(run.pending) >= config.metrics.flush_every:
            advance_state(run)
        step, stopped = step + 1, stopping.answer()

        # Between steps: the guard, which may go back; the length; validation; checkpoint.
        if (back := follow_guard(run, planned)) is not None:
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


def advance_state(run: Run) -> None:
    """Fetch the steps that are still on the device, advance what depends on their losses, and record them."""
    for step in run.pending.drain():
        variance = None if step.adam_variance is None else run.variance.summary(step.adam_variance)
        ratio = run.loss_ratio.update(step.loss)
        run.course.observe(
            seq_len=step.info.planned.seq_len, loss=step.loss, variance=variance.largest if variance else None
        )
        measured = variance.fields(detail=run.config.metrics.adam_variance_detail) if variance else {}
        run.recorder.train(train_record(step, run.rates, loss_ratio=ratio, variance=measured))


def pace(run: Run, after: PlannedStep) -> None:
    """Let adaptive pacing decide on the length after a step, before a checkpoint of that step is written."""
    course = run.course
    if not isinstance(course, AdaptiveCourse) or not course.due(after):
        return
    advance_state(run)
    # One rank decides, so that no difference in the last bit of a loss can part the ranks.
    decision = run.processes.agree_from_main(course.decide(after))
    assert isinstance(decision, Decision)
    course.follow(decision)
    run.loader.follow(course.plan)
    run.recorder.event("pacing", step=decision.step, tokens=after.consumed_tokens + after.tokens, **decision.details())


def validate(run: Run, after: PlannedStep) -> None:
    """Record the loss at full length after a step."""
    advance_state(run)
    losses = run.engine.evaluate((MicroBatch(b.tokens, b.labels), b.weights) for b in run.validation).numpy()
    tokens, buckets = after.consumed_tokens + after.tokens, run.config.validation.position_buckets
    run.recorder.evaluation(EvalRecord.from_positions(losses, step=after.step + 1, tokens=tokens, buckets=buckets))


def save(run: Run, after: PlannedStep) -> Path | None:
    """Write a checkpoint after a step; with guards on, None and no checkpoint where weights are not finite."""
    advance_state(run)
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


def follow_guard(run: Run, after: PlannedStep) -> int | None:
    """Do what the guard asks for after a step; the step to go on with, where that is not the next one.

    Raises:
        GuardStop: the run has to end.
    """
    verdict = None if run.guard is None else run.guard.verdict
    if verdict is None:
        return None
    advance_state(run)
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
    _restore_host_state(manifest, course=run.course, loader=run.loader, loss_ratio=run.loss_ratio)
    run.loader.skip(skipped)
    run.guard.roll_back(manifest.guard, manifest.loss_ratio)
    state = replace(manifest, guard=run.guard.state_dict(), skipped_samples=skipped.to_json())
    run.checkpointer.go_on_from(checkpoint, state)
    # From here on a run that is killed goes on as this one does. The records go after the checkpoints: a later
    # checkpoint without the records of its steps would leave a hole in the metrics.
    run.recorder.roll_back(step=manifest.step, tokens=manifest.tokens)
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
def build_run(config: RunConfig, *, device: Device, processes: Processes) -> Iterator[Run]:
    """Build everything in the order in which mistakes are cheapest to find, and take it down again."""
    # The plan first: data, length of the run and learning rate follow from it.
    course = open_course(config)
    plan = course.plan
    layout = initialize_parallel(config.parallel.tensor, config.parallel.timeout_minutes)
    try:
        # Data: as many samples as the plan reads; this rank's block of every batch.
        datasets = build_samples(config, plan)
        place = {"data_rank": layout.data_rank, "data_size": layout.data_size}
        loader = TrainLoader(datasets.train, plan, prefetch=config.data.prefetch, pin_memory=device.pin_memory, **place)
        validation = ValidationLoader(datasets.valid, config.micro_batch_tokens, **place)

        # Model and engine. Weights come from the seed alone, dropout from the streams of this rank.
        streams = seed_streams(config.seed, layout, device.torch_device)
        kernels = choose_kernels(config.model.kernels, device=device, processes=processes)
        prefix = prefix_length(config, plan)
        engine = build_engine(config, layout, streams, device=device, kernels=kernels, prefix=prefix)

        # State: from the newest checkpoint, or the beginning.
        checkpointer = Checkpointer(
            config.run_dir / "checkpoints",
            engine,
            streams=streams,
            processes=processes,
            identity=_identity(config, world_size=processes.info.world_size),
            keep_last=config.checkpoint.keep_last,
        )
        if not config.checkpoint.resume:
            checkpointer.check_new()
        resumed = checkpointer.resume()
        loss_ratio = LossRatio()
        guard = UpdateGuard(config.guards) if config.guards.are_on else None
        if resumed is not None:
            _restore_host_state(resumed, course=course, loader=loader, loss_ratio=loss_ratio)
            loader.skip(loader.skipped.with_ranges(resumed.skipped_samples))
            if guard is not None:
                guard.load_state_dict(resumed.guard, resumed.loss_ratio)

        # Metrics, on rank 0 alone; the other ranks measure with it and record nothing.
        with processes.failing_together():
            recorder = _open_recorder(config, course, resumed=resumed, processes=processes)
        run = Run(
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
            variance=AdamVariance(engine, config.metrics, device.torch_device, kernels=kernels),
            pending=PendingSteps(),
            rates=Rates(
                flops=lambda step: step_flops(config.model, batch_size=step.batch_size, seq_len=step.seq_len),
                peak_flops=config.metrics.peak_tflops * 1e12 * processes.info.world_size,
            ),
            recorder=recorder,
            profiler=_profiler(config, device, rank=processes.info.rank),
            first_step=resumed.step if resumed else 0,
        )
        with closing(recorder), loader:
            yield run
            advance_state(run)
            if run.profiler is not None:
                run.profiler.close()
    finally:
        destroy_parallel()


def build_samples(config: RunConfig, plan: TrainingPlan) -> Datasets:
    """The samples that a run reads: as many as its plan draws, and those of a validation."""
    return build_datasets(
        config.data,
        seq_len=config.training.seq_len,
        vocab_size=config.model.vocab_size,
        samples=plan.samples,
        valid_samples=config.validation.samples,
        seed=config.seed,
    )


def build_engine(
    config: RunConfig,
    layout: Layout,
    streams: RngStreams,
    *,
    device: Device,
    kernels: Kernels = "reference",
    prefix: int = 0,
) -> DeepSpeedEngine:
    """The model of a run under its engine, with initial weights."""
    model = build_gpt(
        config.model,
        layout=layout,
        positions=config.max_positions,
        seed=config.seed,
        activation_checkpointing=config.parallel.activation_checkpointing,
        streams=streams,
        kernels=kernels,
    )
    settings = EngineSettings(
        optimizer=config.optimizer,
        parallel=config.parallel,
        precision=config.training.precision,
        lr=config.learning_rate.peak,
        deepspeed=config.deepspeed,
    )
    return DeepSpeedEngine(model, settings, layout=layout, device=device, prefix=prefix)


def _identity(config: RunConfig, *, world_size: int) -> RunIdentity:
    return RunIdentity(
        config=config.model_dump(mode="json"),
        determining=config.determining_values(),
        layout={"world_size": world_size, "tensor": config.parallel.tensor, "zero_stage": config.parallel.zero_stage},
    )


def _profiler(config: RunConfig, device: Device, *, rank: int) -> StepProfiler | None:
    wanted = config.metrics.profile
    if wanted is None or rank not in wanted.ranks:
        return None
    file = config.run_dir / "profile" / f"step_{wanted.step}_rank_{rank}.json.gz"
    return StepProfiler(file, device, first=wanted.step - 1, count=wanted.steps)


def _open_recorder(config: RunConfig, course: Course, *, resumed: Manifest | None, processes: Processes) -> Recorder:
    """Open the run's metrics on rank 0 and write down what is being run; the other ranks get one that keeps nothing."""
    if not processes.info.is_main:
        return Recorder()
    step, tokens = (resumed.step, resumed.tokens) if resumed else (0, 0)
    plan = course.plan
    config.run_dir.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config.model_dump(mode="json")), ("plan.json", course.to_json())):
        replace_text(config.run_dir / name, json.dumps(content, indent=1) + "\n")
    sinks = open_sinks(
        config.run_dir,
        config.metrics,
        total_tokens=plan.tokens_at_step(plan.steps_within(config.training.stop_after)),
        step=step,
        tokens=tokens,
        console=Console(stderr=True),
    )
    recorder = Recorder(sinks)
    recorder.event("resume" if resumed else "start", step=step, tokens=tokens, world_size=processes.info.world_size)
    return recorder


def _restore_host_state(manifest: Manifest, *, course: Course, loader: TrainLoader, loss_ratio: LossRatio) -> None:
    """Put what a checkpoint says about the host's side of a run in its place."""
    loss_ratio.load_state_dict(manifest.loss_ratio)
    course.load_state_dict(manifest.curriculum)
    loader.follow(course.plan)
