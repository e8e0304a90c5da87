"""RunConfig: one frozen value that describes a whole run."""

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from megatron_ext.base import Section, Seed
from megatron_ext.config.cluster import ClusterConfig
from megatron_ext.config.data import DataConfig
from megatron_ext.config.model import ModelConfig, ParallelConfig
from megatron_ext.config.training import (
    CheckpointConfig,
    MetricsConfig,
    OptimizerConfig,
    TrainingConfig,
    ValidationConfig,
)
from megatron_ext.curriculum.guards import GuardsConfig
from megatron_ext.curriculum.learning_rate import LearningRateConfig
from megatron_ext.curriculum.opening import open_schedule
from megatron_ext.curriculum.pacing import RunSpec
from megatron_ext.curriculum.pacings import ConstantPacing, CurriculumConfig
from megatron_ext.curriculum.plan import Schedule, TrainingPlan, plan_problems, possible_plans

_UNFIT = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What no file name takes, or what gives orders to a terminal."""

# What changes neither the weights nor the data order: a run may be resumed with other values of these.
_NOT_DETERMINING: dict[str, Any] = {
    **dict.fromkeys(("name", "output_dir", "validation", "checkpoint", "metrics", "parallel", "cluster"), True),
    "data": {"prefetch", "index_cache"},
    "training": {"stop_after"},
    # Another order of the same additions, like another kind of device.
    "model": {"kernels"},
}


class RunConfig(Section):
    """One training run, as its JSON file says it."""

    name: str = "run"
    """Name of the run directory under ``output_dir``: one part of a path, of at most 200 bytes."""

    output_dir: str = "runs"
    """Where run directories are made; relative paths start at the working directory."""

    seed: Seed = 1234
    """Seeds initial weights, dropout and the order of samples."""

    model: ModelConfig
    """Shape and numerics of the GPT."""

    data: DataConfig
    """Token files and their order."""

    training: TrainingConfig
    """Budget, batch and precision."""

    curriculum: CurriculumConfig = ConstantPacing()
    """How the sequence length grows."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """AdamW's settings."""

    learning_rate: LearningRateConfig
    """Warmup and decay."""

    parallel: ParallelConfig = ParallelConfig()
    """Layout over ranks and micro-batches."""

    validation: ValidationConfig = ValidationConfig()
    """Validation loss."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints and resume."""

    metrics: MetricsConfig = MetricsConfig()
    """Metrics and logs."""

    guards: GuardsConfig = GuardsConfig()
    """What to do about a loss that rises or is no number; may be changed when a run is continued."""

    cluster: ClusterConfig = ClusterConfig()
    """Several hosts: environment, network, preflight, failures."""

    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Further DeepSpeed settings, passed through; what another section decides may not be set here."""

    @model_validator(mode="after")
    def _no_contradictions(self) -> "RunConfig":
        if problems := list(self._problems()):
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """One line per contradiction between sections: the keys, the values, and what to write instead."""
        name, places = self.name, {"output_dir": self.output_dir, "data.index_cache": self.data.index_cache or ""}
        if name in {"", ".", ".."} or "/" in name or _UNFIT.search(name) or len(name.encode(errors="replace")) > 200:
            shown = json.dumps(name[:80] + "..." * (len(name) > 80))
            yield f"name is {shown}: one directory under output_dir; no /, no control characters, at most 200 bytes"
        for key, place in places.items():
            if _UNFIT.search(place):
                yield f"{key} is {json.dumps(place)}: no path has control characters"
        seq_len = self.training.seq_len
        yield from self.model.problems(tensor=self.parallel.tensor, seq_len=seq_len)
        yield from self.metrics.problems(seq_len=seq_len, variance_limit=self.curriculum.variance_limit)
        yield from self.parallel.problems(seq_len=seq_len, implementation=self.optimizer.implementation)
        yield from self.data.problems()
        yield from plan_problems(self.curriculum, self.spec)
        yield from self.guards.problems(checkpoint_every=self.checkpoint.every, keep_last=self.checkpoint.keep_last)
        if self.deepspeed:
            from megatron_ext.config.deepspeed import deepspeed_problems

            yield from deepspeed_problems(self.deepspeed, precision=self.training.precision, parallel=self.parallel)

    @property
    def run_dir(self) -> Path:
        """The run's own directory."""
        return Path(self.output_dir) / self.name

    @property
    def spec(self) -> RunSpec:
        """What the plan is made of beside ``curriculum``."""
        training = self.training
        return RunSpec(
            seq_len=training.seq_len,
            batch_size=training.batch_size,
            duration=training.duration,
            learning_rate=self.learning_rate,
            batch_size_warmup=training.batch_size_warmup,
            tail=self.data.tail,
            seed=self.seed,
        )

    def plan(self) -> TrainingPlan:
        """The plan of the run. Raises UserError where durations in different units contradict each other."""
        return TrainingPlan.build(self.curriculum, self.spec)

    def possible_plans(self) -> dict[str, TrainingPlan]:
        """The plan, or under adaptive pacing the two that bound it, by name. Raises as ``plan``."""
        return possible_plans(self.curriculum, self.spec)

    def schedule(self) -> Schedule:
        """The plan as a training loop follows it, which adaptive pacing changes on the way. Raises as ``plan``."""
        return open_schedule(self.curriculum, self.spec)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens one rank may hold in one pass, with the default filled in."""
        return self.parallel.micro_batch_tokens or self.training.seq_len

    @property
    def max_positions(self) -> int:
        """Rows of the position table, with the default filled in."""
        return self.model.max_position_embeddings or self.training.seq_len

    def determining_values(self) -> dict[str, Any]:
        """Everything that determines weights and data order, as JSON values; layout and bookkeeping do not count."""
        values = self.model_dump(mode="json", exclude=_NOT_DETERMINING)
        if self.curriculum.variance_limit:
            # The length then depends on when the variance is measured.
            values["metrics"] = {"adam_variance_every": self.metrics.adam_variance_every}
        return values

    def digest(self) -> str:
        """SHA-256 (hex) of ``determining_values``."""
        return hashlib.sha256(json.dumps(self.determining_values(), sort_keys=True).encode()).hexdigest()
