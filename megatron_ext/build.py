"""The parts of a run on one rank, built from its config in order; each can be built without the others, too."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from megatron_ext.checkpoint.checkpointer import Checkpointer, RunIdentity
from megatron_ext.checkpoint.store import Manifest
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.run import RunConfig
from megatron_ext.config.training import ProfileConfig
from megatron_ext.curriculum.guards import Guard, LossRatio
from megatron_ext.curriculum.plan import Schedule, TrainingPlan
from megatron_ext.data.datasets import Datasets, build_datasets
from megatron_ext.data.loader import TrainLoader, ValidationLoader
from megatron_ext.engine.deepspeed_config import EngineSettings
from megatron_ext.engine.deepspeed_engine import DeepSpeedEngine
from megatron_ext.engine.engine import Engine
from megatron_ext.errors import RunStopped
from megatron_ext.metrics.adam_variance import AdamVariance
from megatron_ext.metrics.recorder import Recorder, open_sinks
from megatron_ext.metrics.step_log import PendingSteps, Utilization
from megatron_ext.model.gpt import build_gpt
from megatron_ext.ops.choice import choose_kernels
from megatron_ext.ops.kernels import Kernels
from megatron_ext.parallel.groups import Layout, destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import RngStreams, seed_streams
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.files import replace_text
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.process_group import Processes

if TYPE_CHECKING:
    from megatron_ext.runtime.profiler import StepProfiler


@dataclass(frozen=True)
class Run:
    """The parts of a run on one rank, at the step from which it goes on."""

    config: RunConfig
    schedule: Schedule
    device: Device
    processes: Processes
    engine: Engine
    loader: TrainLoader
    validation: ValidationLoader
    checkpointer: Checkpointer
    loss_ratio: LossRatio
    guard: Guard | None
    variance: AdamVariance
    pending: PendingSteps
    rates: Utilization | None
    recorder: Recorder
    profiler: "StepProfiler | None"
    first_step: int

    @property
    def plan(self) -> TrainingPlan:
        """The plan as it stands."""
        return self.schedule.plan

    @property
    def last_step(self) -> int:
        """Finished steps with which the loop ends, as the plan stands."""
        return self.plan.steps_within(self.config.training.stop_after)


@contextmanager
def build_run(config: RunConfig, *, device: Device, processes: Processes) -> Iterator[Run]:
    """Build everything in the order in which mistakes are cheapest to find, and take it down again."""
    # The plan first: data, length of the run and learning rate follow from it.
    schedule = config.schedule()
    plan = schedule.plan
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
        prefix = plan[0].seq_len if config.metrics.prefix is None else config.metrics.prefix
        engine = build_engine(config, layout, streams, device=device, kernels=kernels, prefix=prefix)

        # State: from the newest checkpoint, or the beginning.
        checkpointer = _checkpointer(config, engine, streams=streams, processes=processes)
        resumed = checkpointer.resume()
        loss_ratio = LossRatio()
        guard = Guard(config.guards, loss_ratio) if config.guards.are_on else None
        if resumed is not None:
            restore_host_state(resumed, schedule=schedule, loader=loader, loss_ratio=loss_ratio)
            loader.skip(loader.skipped.with_ranges(resumed.skipped_samples))
            if guard is not None:
                guard.load_state_dict(resumed.guard)

        # Metrics, on rank 0 alone; the other ranks measure with it and record nothing.
        with processes.failing_together():
            recorder = _open_recorder(config, schedule, resumed=resumed, processes=processes)
        run = Run(
            config=config,
            schedule=schedule,
            device=device,
            processes=processes,
            engine=engine,
            loader=loader,
            validation=validation,
            checkpointer=checkpointer,
            loss_ratio=loss_ratio,
            guard=guard,
            variance=AdamVariance(engine, config.metrics, device.torch_device, kernels=kernels),
            pending=PendingSteps(left_out=int(resumed.guard.get("left_out", 0)) if resumed else 0),
            rates=_rates(config.model, config.metrics.peak_tflops, ranks=processes.info.world_size),
            recorder=recorder,
            profiler=_profiler(config.metrics.profile, config.run_dir, device=device, rank=processes.info.rank),
            first_step=resumed.step if resumed else 0,
        )
        with _recording(recorder, processes), loader:
            yield run
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


def _checkpointer(config: RunConfig, engine: Engine, *, streams: RngStreams, processes: Processes) -> Checkpointer:
    """The run's checkpoints. Raises UserError where there are some that must not be continued."""
    layout = {
        "world_size": processes.info.world_size,
        "tensor": config.parallel.tensor,
        "zero_stage": config.parallel.zero_stage,
    }
    checkpointer = Checkpointer(
        config.run_dir / "checkpoints",
        engine,
        streams=streams,
        processes=processes,
        identity=RunIdentity(config.model_dump(mode="json"), config.determining_values(), layout),
        config=config.checkpoint,
    )
    if not config.checkpoint.resume:
        checkpointer.check_new()
    return checkpointer


def _rates(model: ModelConfig, peak_tflops: float, *, ranks: int) -> Utilization | None:
    """What utilization is computed from; None where the peak rate of a device is not known."""
    if not peak_tflops:
        return None
    from megatron_ext.model.counts import step_flops

    return Utilization(
        flops=lambda step: step_flops(model, batch_size=step.batch_size, seq_len=step.seq_len),
        peak_flops=peak_tflops * 1e12 * ranks,
    )


def _profiler(wanted: ProfileConfig | None, run_dir: Path, *, device: Device, rank: int) -> "StepProfiler | None":
    if wanted is None or rank not in wanted.ranks:
        return None
    from megatron_ext.runtime.profiler import StepProfiler

    file = run_dir / "profile" / f"step_{wanted.step}_rank_{rank}.json.gz"
    return StepProfiler(file, device, first=wanted.step - 1, count=wanted.steps)


def _open_recorder(
    config: RunConfig, schedule: Schedule, *, resumed: Manifest | None, processes: Processes
) -> Recorder:
    """Open the run's metrics on rank 0 and write down what is being run; the other ranks get one that keeps nothing."""
    if not processes.info.is_main:
        return Recorder()
    step, tokens = (resumed.step, resumed.tokens) if resumed else (0, 0)
    plan = schedule.plan
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        for name, content in (("config.json", config.model_dump(mode="json")), ("plan.json", schedule.to_json())):
            replace_text(config.run_dir / name, json.dumps(content, indent=1) + "\n")
        sinks = open_sinks(
            config.run_dir,
            config.metrics,
            total_tokens=plan.tokens_at_step(plan.steps_within(config.training.stop_after)),
            step=step,
            tokens=tokens,
            console=Console(stderr=True),
        )
    except OSError as error:
        from megatron_ext.runtime.places import unwritable

        raise unwritable(config.run_dir, error) from error
    recorder = Recorder(sinks)
    recorder.event("resume" if resumed else "start", step=step, tokens=tokens, world_size=processes.info.world_size)
    return recorder


@contextmanager
def _recording(recorder: Recorder, processes: Processes) -> Iterator[None]:
    """Close the recorder at the end; RunStopped on all ranks where it could not write all of the metrics."""
    try:
        yield
    except BaseException:
        if lacks := recorder.close():
            LOGGER.warning(lacks)
        raise
    if missing := processes.agree_from_main(recorder.close()):
        raise RunStopped(str(missing))


def restore_host_state(manifest: Manifest, *, schedule: Schedule, loader: TrainLoader, loss_ratio: LossRatio) -> None:
    """Put what a checkpoint says about the host's side of a run in its place."""
    loss_ratio.load_state_dict(manifest.loss_ratio)
    schedule.load_state_dict(manifest.curriculum)
    loader.follow(schedule.plan)
