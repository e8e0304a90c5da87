"""A trial of a run's most expensive step: does it fit into memory, and how fast is it. Nothing is recorded or saved."""

from dataclasses import dataclass
from itertools import islice

from megatron_ext.build import build_engine, build_samples
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan
from megatron_ext.curriculum.sampler import micro_batch_sizes
from megatron_ext.data.loader import TrainLoader
from megatron_ext.engine.engine import cut_micro_batches
from megatron_ext.ops.choice import choose_kernels
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from megatron_ext.parallel.rng import seed_streams
from megatron_ext.runtime.device import Device, mark, seconds_between
from megatron_ext.runtime.process_group import Processes

_MOST_SEGMENTS = 100_000
"""Segments looked at: of mixed lengths, which have one for each step, many cycles."""


@dataclass(frozen=True)
class DryRun:
    """What two steps at the longest length showed."""

    step: PlannedStep
    """The step that was tried, as the plan has it."""

    micro_batches: tuple[int, ...]
    """Sequences of each micro-batch of a rank."""

    seconds: float
    """Time of the second step; the first one allocates."""

    peak_memory_bytes: int
    """Of the rank with the most; of its GPU, or of its process on a CPU."""

    ranks: int

    def lines(self, plan: TrainingPlan) -> list[str]:
        """In words, for people."""
        step, rate = self.step, self.step.tokens / self.seconds
        return [
            f"two steps at the longest length: {step.batch_size:,} sequences of {step.seq_len:,} tokens on "
            f"{self.ranks} rank(s), each in {len(self.micro_batches)} micro-batch(es) of up to "
            f"{max(self.micro_batches)}",
            f"peak memory {self.peak_memory_bytes / 2**30:.2f} GiB on the rank with the most",
            f"{self.seconds:.3g} s a step, {rate:,.0f} tokens/s; at this rate the run's {plan.tokens:,} tokens take "
            f"{plan.tokens / rate / 3600:.3g} h",
        ]


def dry_run(config: RunConfig, plan: TrainingPlan, *, device: Device, processes: Processes) -> DryRun:
    """Train two steps of the plan's largest batch, on real data and from initial weights. Called by all ranks.

    Raises:
        UserError: data or layout do not fit the config.
    """
    segments = islice(plan.segments, _MOST_SEGMENTS)
    planned = plan[max(segments, key=lambda segment: (segment.seq_len, segment.batch_size)).first_step]
    layout = initialize_parallel(config.parallel.tensor, config.parallel.timeout_minutes)
    try:
        datasets = build_samples(config, plan)
        loader = TrainLoader(datasets.train, plan, data_rank=layout.data_rank, data_size=layout.data_size, prefetch=0)
        streams = seed_streams(config.seed, layout, device.torch_device)
        kernels = choose_kernels(config.model.kernels, device=device, processes=processes)
        engine = build_engine(config, layout, streams, device=device, kernels=kernels)
        seconds = 0.0
        sizes: tuple[int, ...] = ()
        for _ in range(2):
            start = mark(device)
            batch = loader.batch(planned)  # tokens, labels [sequences, seq_len]
            sizes = micro_batch_sizes(len(batch.tokens), planned.seq_len, config.micro_batch_tokens)
            pieces = cut_micro_batches(batch.tokens, batch.labels, sizes)
            engine.step(pieces, global_tokens=planned.tokens, lr=planned.lr)
            end = mark(device)
            device.wait()
            seconds = seconds_between(start, end)
        peaks = processes.gather(device.peak_memory())
        return DryRun(
            step=planned,
            micro_batches=sizes,
            seconds=seconds,
            peak_memory_bytes=max(int(str(peak)) for peak in peaks),
            ranks=processes.info.world_size,
        )
    finally:
        destroy_parallel()
