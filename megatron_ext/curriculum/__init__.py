"""Sequence Length Warmup as a library, with numpy and pydantic alone: docs/library.md.

A pacing and the size of a run make a plan; the plan says for every step its length, batch size, learning rate and
samples. Nothing here knows a framework, a device or ranks.
"""

from megatron_ext.base import Duration
from megatron_ext.curriculum.guards import Guard, GuardsConfig, GuardStop, Incident, LossRatio, LossRatioGuard
from megatron_ext.curriculum.learning_rate import LearningRateConfig
from megatron_ext.curriculum.opening import open_schedule
from megatron_ext.curriculum.pacing import BatchSizeWarmup, Pacing, RunSpec
from megatron_ext.curriculum.pacings import (
    PACINGS,
    AdaptivePacing,
    ConstantPacing,
    DiscretePacing,
    LinearPacing,
    MixedPacing,
    RootPacing,
    Stage,
)
from megatron_ext.curriculum.plan import Decision, PlanArrays, PlannedStep, Schedule, TrainingPlan, is_due
from megatron_ext.curriculum.sampler import (
    BatchSlices,
    SkippedSamples,
    check_batches_divide,
    global_batch,
    micro_batch_sizes,
    rank_block,
)
from megatron_ext.errors import UserError

__all__ = [
    "PACINGS",
    "AdaptivePacing",
    "BatchSizeWarmup",
    "BatchSlices",
    "ConstantPacing",
    "Decision",
    "DiscretePacing",
    "Duration",
    "Guard",
    "GuardStop",
    "GuardsConfig",
    "Incident",
    "LearningRateConfig",
    "LinearPacing",
    "LossRatio",
    "LossRatioGuard",
    "MixedPacing",
    "Pacing",
    "PlanArrays",
    "PlannedStep",
    "RootPacing",
    "RunSpec",
    "Schedule",
    "SkippedSamples",
    "Stage",
    "TrainingPlan",
    "UserError",
    "check_batches_divide",
    "global_batch",
    "is_due",
    "micro_batch_sizes",
    "open_schedule",
    "rank_block",
]
