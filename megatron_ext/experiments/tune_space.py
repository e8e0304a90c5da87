"""From a run's config to what is searched and to the config of each probe."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_ext.base import Duration
from megatron_ext.config.loading import parse_layers
from megatron_ext.config.merging import ConfigLayer, Tree
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.pacing import Pacing
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune_search import Candidate, Grid


@dataclass(frozen=True)
class ProbeSettings:
    """How a probe is run and decided: probes with other settings do not compare."""

    threshold: float
    """Perplexity above this times the best so far is a significant fluctuation."""

    steps: int
    """Optimizer steps of a probe without a fluctuation."""

    validate_every: int
    """Steps between validations."""

    validation_samples: int
    """Full-length sequences of a validation."""


@dataclass(frozen=True)
class TuneRun:
    """A run whose curriculum is to be found."""

    layers: tuple[ConfigLayer, ...]
    """The run's config, as files and overrides say it."""

    config: RunConfig
    """The same, parsed."""

    settings: ProbeSettings

    def curriculum(self, candidate: Candidate) -> dict[str, Any]:
        """The curriculum section with the candidate's start and duration; linear unless the run's is root."""
        return self.config.curriculum.tuned(start=candidate.start, steps=candidate.duration)

    def tuned(self, candidate: Candidate) -> RunConfig:
        """The run with the candidate's curriculum.

        Raises:
            UserError: they contradict each other.
        """
        # Merging over a section of the same pacing would keep its other keys; there is nothing to keep.
        cleared = ConfigLayer("the curriculum without its old values", {"curriculum": None})
        layer = ConfigLayer(
            f"s = {candidate.start}, T = {candidate.duration}", {"curriculum": self.curriculum(candidate)}
        )
        return parse_layers([*self.layers, cleared, layer])

    def plan(self, candidate: Candidate) -> TrainingPlan:
        """The whole run's plan with the candidate's curriculum.

        Raises:
            UserError: they contradict each other, as where T does not fit into the run.
        """
        return self.tuned(candidate).plan()

    def probe_tokens(self, candidate: Candidate, *, steps: int | None = None) -> int:
        """Tokens of a probe's first ``steps``; by default of a whole one, that is, one without a fluctuation."""
        plan = self.plan(candidate)
        return plan.tokens_at_step(min(self.settings.steps if steps is None else steps, plan.steps))

    def probe_config(self, candidate: Candidate, *, output_dir: str) -> RunConfig:
        """The first part of the candidate's run, validated often, under ``output_dir``/``probe_name``."""
        changes: Tree = {
            "name": probe_name(candidate),
            "output_dir": output_dir,
            "training": {"stop_after": {"steps": self.settings.steps}},
            "validation": {
                "every": {"steps": self.settings.validate_every},
                "samples": self.settings.validation_samples,
            },
            "checkpoint": {"keep_last": 1, "resume": True},
            "metrics": {"tensorboard": False},
            # A guard would mend or end what the probe is to show.
            "guards": {"loss_ratio": None, "non_finite": None},
        }
        tuned = ConfigLayer("the tuned run", self.tuned(candidate).model_dump(mode="json"))
        return parse_layers([tuned, ConfigLayer("tune", changes)])

    def identity(self) -> dict[str, Any]:
        """What the verdicts of earlier probes depend on, as JSON values."""
        determining = self.config.determining_values()
        determining["curriculum"] = self.curriculum(Candidate(0, 0))
        return {"settings": asdict(self.settings), "config": determining}


def probe_name(candidate: Candidate) -> str:
    """Name of the probe's run directory."""
    return f"s{candidate.start}_T{candidate.duration}"


def unit_of(warmup: Duration | None, *, start: int, batch_size: int) -> int:
    """Steps of the learning rate's warmup, the unit of T and of a probe's length.

    A warmup of X tokens is X / (s * batch) steps, as in the paper.

    Raises:
        UserError: the run has no warmup.
    """
    if warmup is None:
        raise UserError(
            "learning_rate.warmup is not given, in whose steps T and the probes are measured: write one, or pass "
            "--unit STEPS"
        )
    if warmup.steps is not None:
        return warmup.steps
    assert warmup.tokens is not None
    return max(1, math.ceil(warmup.tokens / (start * batch_size)))


def default_starts(curriculum: Pacing, *, seq_len: int, parameters: int) -> tuple[int, ...]:
    """Start lengths worth probing: from 8, or from 64 for a billion parameters; multiples below the full length."""
    multiple, full = curriculum.step_between_lengths, curriculum.last_length(seq_len)
    wanted = (64, 80, 96, 128, 256) if parameters >= 10**9 else (8, 16, 32, 64, 128)
    found = tuple(start for start in wanted if start % multiple == 0 and start < full)
    if not found:
        raise UserError(
            f"none of the usual start lengths {', '.join(map(str, wanted))} is a multiple of {multiple} below the full "
            f"length {full}: pass --starts"
        )
    return found


@dataclass(frozen=True)
class DurationSpacing:
    """How the T to choose among are spaced."""

    unit: int
    """Steps of the learning rate's warmup."""

    ratio: float
    """Each T over the one before."""

    first: int
    """T with which start lengths are compared, in units."""

    given: tuple[int, ...] | None = None
    """The durations themselves, in steps, instead."""


def grid_of(tune_run: TuneRun, starts: Sequence[int], spacing: DurationSpacing, *, beginning: int) -> Grid:
    """What is searched: for each start the durations that fit into the run.

    Raises:
        UserError: a start length, or the T with which starts are compared, does not suit the run.
    """
    if list(starts) != sorted(set(starts)):
        raise UserError(f"--starts {','.join(map(str, starts))}: write different lengths, rising")
    if spacing.given is None:
        first = spacing.first * spacing.unit
    else:
        if list(spacing.given) != sorted(set(spacing.given)):
            raise UserError(
                f"--durations {','.join(map(str, spacing.given))}: write different numbers of steps, rising"
            )
        first = min(spacing.given, key=lambda steps: abs(steps - spacing.first * spacing.unit))
    durations = {start: _durations_of(tune_run, start, spacing, first=first) for start in starts}
    return Grid(durations=durations, first=first, beginning=beginning)


def _durations_of(tune_run: TuneRun, start: int, spacing: DurationSpacing, *, first: int) -> tuple[int, ...]:
    # The first T has to fit: what is wrong with the start or the run is said here.
    tune_run.plan(Candidate(start, first))
    if spacing.given is not None:
        return tuple(steps for steps in spacing.given if steps <= first or _fits(tune_run, Candidate(start, steps)))
    durations = [first]
    while (lower := round(durations[0] / spacing.ratio)) >= spacing.unit and lower < durations[0]:
        durations.insert(0, lower)
    while _fits(tune_run, Candidate(start, upper := max(durations[-1] + 1, round(durations[-1] * spacing.ratio)))):
        durations.append(upper)
    return tuple(durations)


def _fits(tune_run: TuneRun, candidate: Candidate) -> bool:
    """Whether the length reaches its end within the run."""
    try:
        tune_run.plan(candidate)
    except UserError:
        return False
    return True
