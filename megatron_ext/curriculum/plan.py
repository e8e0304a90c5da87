"""TrainingPlan: everything a run will do, known before it starts; Schedule: the plan as a training loop follows it.

Batch size, sequence length and learning rate are functions of the step; consumed tokens are their cumulative sum; the
decay and the end of the run are measured on that sum. A plan is a few segments (see segments.py) and a learning rate
(see learning_rate.py), so it is built without a loop over steps and any step is found by a binary search. Nothing here
depends on ranks. Adaptive pacing decides a plan as the run goes (adaptive.py).
"""

import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from megatron_ext.base import Duration
from megatron_ext.curriculum.learning_rate import LearningRate, learning_rate
from megatron_ext.curriculum.pacing import Pacing, RunSpec, Tail
from megatron_ext.curriculum.segments import (
    CycleSegments,
    Floats,
    Ints,
    Segment,
    samples_of_streams,
    segment_of,
    steps_of,
    steps_to_reach,
    tokens_after,
)
from megatron_ext.errors import UserError


@dataclass(frozen=True)
class PlannedStep:
    """One optimizer step. ``consumed_*`` are the counts before it."""

    step: int  # 0-based
    batch_size: int  # sequences over all ranks
    seq_len: int  # tokens per sequence
    lr: float
    tokens: int  # tokens of this step: ``batch_size * seq_len``
    consumed_tokens: int
    consumed_samples: int  # dataset samples drawn, in whole or in part

    @property
    def end_step(self) -> int:
        """Steps finished after it."""
        return self.step + 1

    @property
    def end_tokens(self) -> int:
        """Tokens consumed after it."""
        return self.consumed_tokens + self.tokens


@dataclass(frozen=True)
class PlanArrays:
    """All steps as columns of shape [steps]; what the names mean is said at PlannedStep."""

    step: Ints
    batch_size: Ints
    seq_len: Ints
    lr: Floats
    tokens: Ints
    consumed_tokens: Ints
    consumed_samples: Ints


@dataclass(frozen=True)
class TrainingPlan:
    """The run, step by step: ``plan[t]`` for t in [0, steps)."""

    segments: Sequence[Segment]  # phases of constant batch size and length, in order; at least one
    learning_rate: LearningRate
    duration: Duration  # what the run was asked to last; ``steps`` and ``tokens`` are what it lasts
    seq_len: int  # full length in tokens: that of a dataset sample
    tail: Tail  # what becomes of the rest of a sample when a step is shorter (see sampler.py)
    # Dataset samples to provide for where the plan may still change; None: those that the segments draw.
    most_samples: int | None = None

    @classmethod
    def build(cls, pacing: Pacing, run: RunSpec) -> "TrainingPlan":
        """The plan of a run; of adaptive pacing the one that holds the length wherever it may, its slowest.

        Raises UserError if values contradict each other, a line for each; or, found only by planning, durations in
        different units do: a warmup of length, batch size or learning rate that does not end within the run, a cooldown
        that begins before the warmup ends.
        """
        if problems := plan_problems(pacing, run):
            raise UserError("\n".join(problems))
        if bounds := bounding_plans(pacing, run):
            return replace(bounds["slowest"], most_samples=_most_samples(bounds, batch_size=run.batch_size))
        return cls.of_segments(pacing.segments(run), run)

    @classmethod
    def of_segments(cls, segments: Sequence[Segment], run: RunSpec) -> "TrainingPlan":
        """The plan of a run with these segments. Raises UserError where the learning rate's durations do not fit."""
        rate = learning_rate(run.learning_rate, segments, run.duration)
        return cls(segments=segments, learning_rate=rate, duration=run.duration, seq_len=run.seq_len, tail=run.tail)

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.segments[-1].end_step

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.segments[-1].end_tokens

    @property
    def batch_sizes(self) -> list[int]:
        """Batch sizes that occur, rising."""
        if isinstance(self.segments, CycleSegments):
            return [self.segments.batch_size]
        return sorted({segment.batch_size for segment in self.segments})

    @property
    def overshoot(self) -> int:
        """Tokens beyond the budget: less than the last step's batch, 0 for a run that is counted in steps."""
        return 0 if self.duration.tokens is None else self.tokens - self.duration.tokens

    @property
    def samples(self) -> int:
        """Dataset samples that the run needs, at most where the plan may still change.

        truncate: one for every sequence. recycle: for each of the batch's streams as many as hold the stream's tokens.
        """
        if self.most_samples is not None:
            return self.most_samples
        last = self.segments[-1]
        if self.tail == "truncate":
            return last.first_samples + last.steps * last.batch_size
        return int(samples_of_streams(last.batch_size, np.array([last.end_tokens]), self.seq_len)[0])

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[PlannedStep]:
        return (self[step] for step in range(self.steps))

    def __getitem__(self, step: int) -> PlannedStep:
        """Step number ``step``, found in O(log segments). Raises IndexError outside [0, steps)."""
        step = operator.index(step)
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside the plan's steps [0, {self.steps})")
        # The same arithmetic as for all steps at once, on one row, so that both agree to the last bit.
        segment = segment_of(self.segments, step)
        columns = self._columns([segment], np.array([step]), [1])
        return PlannedStep(
            step=step,
            batch_size=segment.batch_size,
            seq_len=segment.seq_len,
            lr=float(columns.lr[0]),
            tokens=segment.step_tokens,
            consumed_tokens=int(columns.consumed_tokens[0]),
            consumed_samples=int(columns.consumed_samples[0]),
        )

    def step_at_tokens(self, tokens: int) -> int:
        """Fewest steps after which at least ``tokens`` tokens are consumed: the inverse of ``consumed_tokens``.

        ``step_at_tokens(plan[t].consumed_tokens) == t``, and the whole run's tokens give ``steps``. Raises ValueError
        outside [0, tokens of the run].
        """
        if not 0 <= tokens <= self.tokens:
            raise ValueError(f"{tokens:,} tokens are outside the plan's [0, {self.tokens:,}]")
        return steps_to_reach(self.segments, tokens)

    def tokens_at_step(self, step: int) -> int:
        """Tokens consumed before ``step``, for steps in [0, steps]; ValueError outside."""
        if not 0 <= step <= self.steps:
            raise ValueError(f"step {step:,} is outside the plan's [0, {self.steps:,}]")
        return tokens_after(self.segments, step)

    def steps_within(self, part: Duration | None) -> int:
        """Steps of the run up to and including the one that reaches ``part``; all steps with None or a longer one."""
        if part is None:
            return self.steps
        return min(steps_of(part, self.segments), self.steps)

    def arrays(self) -> PlanArrays:
        """All steps at once, for plots and sums."""
        segments = list(self.segments)
        return self._columns(segments, np.arange(self.steps), [segment.steps for segment in segments])

    def to_json(self) -> dict[str, Any]:
        """Segments and totals, as plan.json holds them."""
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "samples": self.samples,
            "overshoot_tokens": self.overshoot,
            "duration": self.duration.model_dump(exclude_none=True),
            "seq_len": self.seq_len,
            "tail": self.tail,
            "learning_rate": asdict(self.learning_rate),
            **_segments_json(self.segments),
        }

    def _columns(self, segments: Sequence[Segment], step: Ints, counts: Sequence[int]) -> PlanArrays:
        """The rows of ``step`` ([n]), of which ``counts`` consecutive ones are in each of ``segments``."""

        def spread(name: str) -> Ints:
            # [segments] -> [n]
            return np.repeat(np.array([getattr(segment, name) for segment in segments], dtype=np.int64), counts)

        # Within a segment every step has the same tokens, so the sum before a step is one product: consumed = first
        # tokens of the segment + steps done in it * tokens of a step.
        batch_size, seq_len, done = spread("batch_size"), spread("seq_len"), step - spread("first_step")
        tokens = batch_size * seq_len
        consumed = spread("first_tokens") + done * tokens
        # A sample for every sequence, or as many as hold what the streams have read.
        if self.tail == "truncate":
            samples = spread("first_samples") + done * batch_size
        else:
            samples = samples_of_streams(batch_size, consumed, self.seq_len)
        return PlanArrays(
            step=step,
            batch_size=batch_size,
            seq_len=seq_len,
            lr=self.learning_rate.at(step + 1, consumed + tokens),
            tokens=tokens,
            consumed_tokens=consumed,
            consumed_samples=samples,
        )


def _segments_json(segments: Sequence[Segment]) -> dict[str, Any]:
    """Segments one by one, or the cycle that they repeat."""
    if isinstance(segments, CycleSegments):
        return {"cycle": {"seq_len": segments.cycle, "batch_size": segments.batch_size}}
    return {"segments": [asdict(segment) for segment in segments]}


def plan_problems(pacing: Pacing, run: RunSpec) -> list[str]:
    """One line per contradiction that shows without a plan: key, value, what to write."""
    return [*pacing.problems(run), *run.problems()]


def bounding_plans(pacing: Pacing, run: RunSpec) -> dict[str, TrainingPlan]:
    """The two linear plans between which adaptive pacing stays; none under fixed pacing. Raises as ``build``."""
    plans: dict[str, TrainingPlan] = {}
    for which, bound in pacing.bounds().items():
        try:
            plans[which] = TrainingPlan.of_segments(bound.segments(run), run)
        except UserError as error:
            raise UserError(f"curriculum.{which}: {error}") from None
    return plans


def possible_plans(pacing: Pacing, run: RunSpec) -> dict[str, TrainingPlan]:
    """The plan of a run, or under adaptive pacing the two that bound it, by name. Raises as ``build``."""
    return bounding_plans(pacing, run) or {"plan": TrainingPlan.build(pacing, run)}


def is_due(every: Duration | None, step: PlannedStep) -> bool:
    """Whether the end of ``step`` passes a multiple of ``every``; never with None.

    By tokens it is due after the step that reaches or passes the multiple, once for each step that does.
    """
    if every is None:
        return False
    if every.steps is not None:
        return step.end_step % every.steps == 0
    assert every.tokens is not None
    return step.end_tokens // every.tokens > step.consumed_tokens // every.tokens


def _most_samples(bounds: Mapping[str, TrainingPlan], *, batch_size: int) -> int:
    """Samples that are enough for every plan between the bounds: none has more steps than the slowest."""
    slowest = bounds["slowest"]
    if slowest.tail == "truncate":
        return slowest.samples
    if slowest.duration.tokens is None:
        return bounds["fastest"].samples
    # The last step begins below the budget, on a whole number of tokens a stream, and is at most of full length.
    stream_tokens = (slowest.duration.tokens - 1) // batch_size + slowest.segments[-1].seq_len
    return int(samples_of_streams(batch_size, np.array([stream_tokens * batch_size]), slowest.seq_len)[0])


Action = Literal["grow", "hold", "back"]


@dataclass(frozen=True)
class Decision:
    """What happens to the length, and why. Made by one rank and followed by all."""

    step: int  # finished steps; the first step that it concerns has this number
    action: Action  # what the measurements ask for; the bounds may keep the length from following
    seq_len: int  # length from here on, in tokens
    previous: int  # length of the step before, in tokens
    loss_ratio: float | None  # largest in the interval, as adaptive.py computes it
    variance_ratio: float | None  # likewise; None where the variance was not measured
    reason: str  # in words, for people

    def details(self) -> dict[str, object]:
        """What the event in the metrics says, beside step and tokens."""
        return {name: value for name, value in asdict(self).items() if name != "step"}


class Schedule:
    """The plan of a run as it stands. This one is fixed: known from the beginning and never another.

    A loop asks ``plan`` for the step, tells ``observe`` its outcome, and where ``due`` says so lets ``decide`` and
    ``apply`` change the steps that are left.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        self._plan = plan

    @property
    def plan(self) -> TrainingPlan:
        """The run as it stands; steps that are done never change in it."""
        return self._plan

    def observe(self, *, seq_len: int, loss: float, variance: float | None = None) -> None:
        """Take the outcome of a step, every step once and in order, before a decision after it.

        Args:
            seq_len: Length of the step, in tokens.
            loss: Mean loss in nats per token, also when it is not finite.
            variance: Largest element of sqrt(Adam's second moment); None where it was not measured.
        """

    def due(self, after: PlannedStep) -> bool:  # noqa: ARG002
        """Whether a decision is due after a step."""
        return False

    def decide(self, after: PlannedStep) -> Decision:
        """The decision after a step, from what was observed up to it; changes nothing. Asked where one is due."""
        raise AssertionError(f"no decision is due after step {after.step} of a fixed plan")

    def apply(self, decision: Decision) -> None:
        """Go on as decided. Steps before ``decision.step`` stay as they were."""
        raise AssertionError(f"a fixed plan has no decisions to apply, such as {decision}")

    def to_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        return self._plan.to_json()

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs beside pacing, run and step, as JSON values."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Raises UserError if that is of another pacing or version."""
        if state:
            raise UserError(
                f"the checkpoint holds a pacing state with {', '.join(sorted(state))}, and this version's pacing of "
                "the run has none: resume with the version that wrote it"
            )
