"""Sections that say how much and how to train: budget, optimizer, validation, checkpoints, metrics."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from megatron_ext.base import Duration, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Section
from megatron_ext.curriculum.pacing import BatchSizeWarmup


class TrainingConfig(Section):
    """The budget, the batch and the precision."""

    seq_len: PositiveInt
    """Full sequence length in tokens: what samples are cut to, and the length of validation."""

    batch_size: PositiveInt
    """Sequences per optimizer step over all ranks."""

    duration: Duration
    """The run ends with the step that reaches this many steps or tokens."""

    stop_after: Duration | None = None
    """Stop after the step that reaches this point, counted from the start of the run, with a validation and a
    checkpoint. Lengths, batch sizes and learning rates stay those of the whole ``duration``, and the run goes on when
    it is started again with a later point or none."""

    batch_size_warmup: BatchSizeWarmup | None = None
    """GPT-3's comparator to SLW; not together with a growing length."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Dtype of weights and activations in forward and backward; fp16 with dynamic loss scaling."""


class OptimizerConfig(Section):
    """AdamW."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and second moment."""

    eps: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""

    weight_decay: NonNegativeFloat = 0.1
    """Decoupled weight decay of matrices; biases and LayerNorm parameters are not decayed (GPT-2 here: 0.01)."""

    clip_grad: NonNegativeFloat = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""

    implementation: Literal["auto", "torch", "deepspeed_fused", "deepspeed_cpu"] = "auto"
    """Adam kernel: torch's fused AdamW (auto, nothing to compile), or DeepSpeed's FusedAdam (GPU) or CPUAdam, which
    are compiled at first use; offloading the optimizer needs DeepSpeed's CPUAdam and auto picks it."""


class ValidationConfig(Section):
    """Loss at full length, whatever the training length is."""

    every: Duration | None = None
    """Validate each time this many steps or tokens have passed, and after the last step; null: after the last only."""

    samples: PositiveInt = 256
    """Full-length sequences per validation, the same ones each time."""

    position_buckets: bool = True
    """Also record the loss by position in the sequence, in buckets whose edges are 0, 8, 16, 32, ..., seq_len."""


class CheckpointConfig(Section):
    """What is kept on disk."""

    every: Duration | None = None
    """Save each time this many steps or tokens have passed, and after the last step; null: after the last only."""

    keep_last: PositiveInt = 3
    """Complete checkpoints to keep; older ones are removed after a newer one is complete."""

    resume: bool = True
    """Continue from the newest complete checkpoint of the run directory, if there is one; false refuses to start where
    there is one."""

    verify: bool = True
    """Write the SHA-256 of every file into checkpoint.json and compare before anything is loaded, about 1 s per GB;
    false does neither."""

    fallback: bool = True
    """Where the newest checkpoint is damaged, continue from the newest whole one and rename the damaged ones to
    ``step_N.damaged``; false refuses to start."""


class ProfileConfig(Section):
    """A trace of some steps by torch.profiler, into ``profile/`` of the run directory."""

    step: PositiveInt
    """First step of the trace, counted from 1; take one after the first few, which warm up."""

    steps: PositiveInt = 3
    """Steps of the trace; its file grows by some megabytes with each."""

    ranks: tuple[NonNegativeInt, ...] = (0,)
    """Ranks that write one."""


class MetricsConfig(Section):
    """What is measured and where it goes; metrics.jsonl is always written."""

    log_every: PositiveInt = 10
    """Steps between log lines where the output is no terminal."""

    tensorboard: bool = True
    """Also write TensorBoard events, once by tokens and once by steps."""

    flush_every: PositiveInt = 10
    """Steps whose losses are fetched from the device together."""

    peak_tflops: NonNegativeFloat = 0.0
    """Peak rate of one device at the run's precision, for the model FLOPs utilization; 0: mfu is not reported."""

    prefix: NonNegativeInt | None = None
    """Also record the training loss over the first this many tokens of every sequence, so that steps of different
    lengths compare; null takes the run's first length, 0 turns it off."""

    adam_variance_every: NonNegativeInt = 10
    """Steps between measurements of the gradient variance in Adam's second moment; 0: never."""

    adam_variance_detail: bool = False
    """Also record the gradient variance of each layer and of each kind of parameter."""

    profile: ProfileConfig | None = None
    """Trace some steps with torch.profiler; null: no trace."""

    keep_sample_ids: bool = False
    """Also write each step's sample ids and offsets into metrics.jsonl (large; for auditing the data order)."""

    def problems(self, *, seq_len: int, variance_limit: float) -> Iterator[str]:
        """What contradicts ``training.seq_len``, or a pacing that asks for the variance."""
        if (self.prefix or 0) > seq_len:
            yield (
                f"metrics.prefix is {self.prefix}, more than training.seq_len {seq_len}: write at most {seq_len}, or "
                "null for the first length of the run"
            )
        if variance_limit and not self.adam_variance_every:
            yield (
                f"curriculum.variance_above is {variance_limit:g}, but metrics.adam_variance_every 0 measures no "
                "variance: write its interval in steps, or curriculum.variance_above 0"
            )
