"""A run's parts on one rank: built in order, taken down again, and taken back to a checkpoint."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.store import Manifest
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.adaptive import open_course
from megatron_ext.curriculum.course import Course
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.skips import positions_between
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import TrainLoader, ValidationLoader
from megatron_ext.engine.engine import TrainEngine
from megatron_ext.metrics.observer import CourseObserver
from megatron_ext.metrics.positions import prefix_length
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.step_log import Measures, StepLog
from megatron_ext.model.counts import step_flops
from megatron_ext.model.gpt import build_gpt
from megatron_ext.ops.choice import choose_kernels
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.files import replace_text
from megatron_ext.runtime.process_group import Processes
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


@contextmanager
def set_up(config: RunConfig, *, device: Device, processes: Processes) -> Iterator[Run]:
    """Build everything in the order in which mistakes are cheapest to find, and take it down again."""
    course = open_course(config)
    plan = course.plan
    layout = initialize_parallel(config.parallel.tensor, config.parallel.timeout_minutes)
    try:
        datasets = _datasets(config, samples=plan.samples)
        place = {"data_rank": layout.data_rank, "data_size": layout.data_size}
        loader = TrainLoader(datasets.train, plan, prefetch=config.data.prefetch, pin_memory=device.pin_memory, **place)
        validation = ValidationLoader(datasets.valid, config.micro_batch_tokens, **place)
        streams = seed_streams(config.seed, layout, device.torch_device)
        kernels = choose_kernels(config.model.kernels, device=device, processes=processes)
        model, prefix = build_gpt(config, layout, streams, kernels=kernels), prefix_length(config, plan)
        engine = TrainEngine(config, model, layout=layout, device=device, prefix=prefix)
        checkpointer = _checkpointer(config, engine, streams=streams, processes=processes)
        if not config.checkpoint.resume:
            checkpointer.check_new()
        resumed = checkpointer.resume()
        loss_ratio = LossRatio()
        guard = UpdateGuard(config.guards) if config.guards.are_on else None
        if resumed is not None:
            _continue_from(resumed, course=course, loader=loader, loss_ratio=loss_ratio)
            loader.skip(loader.skipped.with_ranges(resumed.skipped_samples))
            if guard is not None:
                guard.load_state_dict(resumed.guard, resumed.loss_ratio)
        with processes.failing_together():
            recorder = _open_recorder(config, course, resumed=resumed, processes=processes)
        variance = AdamVariance(engine, config.metrics, device.torch_device, kernels=kernels)
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


def _datasets(config: RunConfig, *, samples: int) -> Datasets:
    return build_datasets(
        config.data,
        seq_len=config.training.seq_len,
        vocab_size=config.model.vocab_size,
        samples=samples,
        valid_samples=config.validation.samples,
        seed=config.seed,
    )


def _checkpointer(config: RunConfig, engine: TrainEngine, *, streams: RngStreams, processes: Processes) -> Checkpointer:
    world, parallel = processes.info.world_size, config.parallel
    return Checkpointer(
        config.run_dir / "checkpoints",
        engine,
        streams=streams,
        processes=processes,
        identity=RunIdentity(
            config=config.model_dump(mode="json"),
            determining=config.determining_values(),
            layout={"world_size": world, "tensor": parallel.tensor, "zero_stage": parallel.zero_stage},
        ),
        keep_last=config.checkpoint.keep_last,
    )


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
    recorder = Recorder([*sinks, CourseObserver(course)])
    recorder.event("resume" if resumed else "start", step=step, tokens=tokens, world_size=processes.info.world_size)
    return recorder


def _continue_from(manifest: Manifest, *, course: Course, loader: TrainLoader, loss_ratio: LossRatio) -> None:
    """Put what a checkpoint says about the host's side of a run in its place."""
    loss_ratio.load_state_dict(manifest.loss_ratio)
    course.load_state_dict(manifest.curriculum)
    loader.follow(course.plan)


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
    _continue_from(manifest, course=run.course, loader=run.loader, loss_ratio=run.loss_ratio)
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
