"""Adaptive pacing: every few steps the length grows, holds or steps back, between a fastest and a slowest linear plan.

At any moment there is a whole plan: what was decided so far, and then the present length, held wherever the slowest
plan allows it. A decision replaces it by a plan that agrees with it up to the step of the decision. So everything that
asks a plan (the loader, the learning rate, the end of the run) works as under fixed pacing, and the run has no special
end: it lasts until its budget is consumed.

Why the cost is bounded: with L_slow <= L <= L_fast at every point (a step count, or a token count for bounds in
tokens), tokens consumed after t steps are at least those of the slowest plan and at most those of the fastest, by
induction over t, since both ladders rise. The run therefore takes at most as many steps, and under ``truncate`` draws
at most as many samples, as the slowest plan.

What the learning rate of a step depends on lies in its past: the checks of the config see to it that the decay ends at
a known token count, and the end of the warmup is known once it is there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from megatron_ext.config.curriculum import AdaptivePacing
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.course import Course
from megatron_ext.curriculum.instability import Instability, InstabilityWatch
from megatron_ext.curriculum.pacing import Level, batch_ladder, length_ladder, value_at
from megatron_ext.curriculum.plan import PlannedStep, TrainingPlan, bounding_plans
from megatron_ext.curriculum.segments import Stretch, climb
from megatron_ext.errors import UserError

Action = Literal["grow", "hold", "back"]

_STATE: Final = {"lengths", "last_ratio", "watch"}


@dataclass(frozen=True)
class Decision:
    """What happens to the length, and why. Made by one rank and followed by all."""

    step: int
    """Finished steps; the first step that it concerns has this number."""

    action: Action
    """What the measurements ask for; the bounds may keep the length from following."""

    previous: int
    """Length of the step before, in tokens."""

    seq_len: int
    """Length from here on, in tokens."""

    loss_ratio: float | None
    """Largest in the interval (see instability.py)."""

    variance_ratio: float | None
    """Likewise; None where the variance was not measured."""

    reason: str
    """In words, for people."""

    def details(self) -> dict[str, object]:
        """What the event in the metrics says, beside step and tokens."""
        return {
            "action": self.action,
            "seq_len": self.seq_len,
            "previous": self.previous,
            "loss_ratio": self.loss_ratio,
            "variance_ratio": self.variance_ratio,
            "reason": self.reason,
        }


def open_course(config: RunConfig) -> Course:
    """The course of a run from its beginning. Raises UserError as TrainingPlan.from_config does."""
    plan = TrainingPlan.from_config(config)
    return AdaptiveCourse(config, plan) if isinstance(config.curriculum, AdaptivePacing) else Course(plan)


class AdaptiveCourse(Course):
    """A plan that is decided as the run goes. One process decides (``decide``), all processes ``follow``."""

    def __init__(self, config: RunConfig, plan: TrainingPlan) -> None:
        """Begin a run; ``plan`` is that of TrainingPlan.from_config."""
        super().__init__(plan)
        assert isinstance(config.curriculum, AdaptivePacing)
        self._config, self._pacing = config, config.curriculum
        self._bounds = bounding_plans(config)
        full = config.training.seq_len
        self._fastest = length_ladder(self._pacing.bound("fastest"), full)
        self._slowest = length_ladder(self._pacing.bound("slowest"), full)
        self._growth = self._pacing.growth or self._default_growth()
        self._back = self._pacing.back or self._growth
        self._watch = InstabilityWatch(smoothing=self._pacing.smoothing)
        self._last_ratio: float | None = None

    def observe(self, *, seq_len: int, loss: float, variance: float | None) -> None:
        """Take the outcome of a step, every step once and in order; needed where decisions are made."""
        self._watch.observe(seq_len=seq_len, loss=loss, variance=variance)

    def due(self, after: PlannedStep) -> bool:
        """Whether a decision is due after a step: every interval, until the slowest plan has reached its end."""
        step, tokens = after.step + 1, after.consumed_tokens + after.tokens
        open_ended = value_at(self._slowest, step=step, tokens=tokens) < self._slowest[-1].value
        return step % self._pacing.interval == 0 and step < self.plan.steps and open_ended

    def decide(self, after: PlannedStep) -> Decision:
        """The decision after a step, from what was observed up to it; changes nothing."""
        step, tokens = after.step + 1, after.consumed_tokens + after.tokens
        seen = self._watch.seen
        action, reason = self._judge(seen)
        multiples = {"grow": self._growth, "hold": 0, "back": -self._back}[action]
        wanted = after.seq_len + multiples * self._pacing.multiple
        slowest = value_at(self._slowest, step=step, tokens=tokens)
        fastest = value_at(self._fastest, step=step, tokens=tokens)
        bound = "; the fastest plan's length" if wanted > fastest else "; the slowest plan's length"
        return Decision(
            step=step,
            action=action,
            previous=after.seq_len,
            seq_len=min(max(wanted, slowest), fastest),
            loss_ratio=seen.loss_ratio,
            variance_ratio=seen.variance_ratio,
            reason=reason if slowest <= wanted <= fastest else reason + bound,
        )

    def follow(self, decision: Decision) -> None:
        """Go on as decided. Steps before ``decision.step`` stay as they were."""
        if decision.seq_len != self.plan[decision.step].seq_len:
            self._plan = self._replanned(decision.step, decision.seq_len)
        self._last_ratio = decision.loss_ratio
        self._watch.next_interval(shorter=decision.seq_len < decision.previous)

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands, and the two between which it stays."""
        return self.plan.to_json() | {"bounds": {which: plan.to_json() for which, plan in self._bounds.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The plan's lengths, each with its first step, and what was measured since the last decision."""
        return {
            "lengths": [[segment.first_step, segment.seq_len] for segment in self.plan.segments],
            "last_ratio": self._last_ratio,
            "watch": self._watch.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned.

        Raises:
            UserError: a key is missing.
        """
        missing = sorted(_STATE - state.keys())
        if missing:
            raise UserError(
                f"the checkpoint's pacing state lacks {', '.join(missing)}: it was written by another version; resume "
                "with that version"
            )
        batch_size = self._config.training.batch_size
        stretches: list[Stretch] = []
        tokens = 0
        for first_step, seq_len in state["lengths"]:
            if stretches:
                tokens += (first_step - stretches[-1].first_step) * batch_size * stretches[-1].seq_len
            stretches.append(Stretch(first_step, tokens, batch_size, seq_len))
        self._plan = self._plan_of(stretches)
        self._last_ratio = state["last_ratio"]
        self._watch.load_state_dict(state["watch"])

    def _judge(self, seen: Instability) -> tuple[Action, str]:
        pacing, ratio, variance = self._pacing, seen.loss_ratio, seen.variance_ratio
        if ratio is None:
            return "hold", "no loss was judged"
        if ratio > pacing.back_above:
            # A run that recovers is left alone: stepping back again would only undo what it needs no more.
            if self._last_ratio is None or ratio >= self._last_ratio:
                return "back", f"loss ratio {ratio:.4g} above back_above {pacing.back_above:g}"
            return "hold", f"loss ratio {ratio:.4g} falls from {self._last_ratio:.4g}"
        if ratio > pacing.hold_above:
            return "hold", f"loss ratio {ratio:.4g} above hold_above {pacing.hold_above:g}"
        if pacing.variance_above and variance is not None and variance > pacing.variance_above:
            return "hold", f"variance {variance:.4g} times its median, above variance_above {pacing.variance_above:g}"
        return "grow", f"loss ratio {ratio:.4g}"

    def _default_growth(self) -> int:
        segments = self._bounds["fastest"].segments
        end = segments[-1].seq_len
        steps = next(segment.first_step for segment in segments if segment.seq_len == end)
        multiples = (end - self._pacing.start) // self._pacing.multiple
        return max(1, -(-2 * multiples * self._pacing.interval // max(1, steps)))

    def _replanned(self, step: int, seq_len: int) -> TrainingPlan:
        """The plan as it is before ``step``, and from there on ``seq_len``, held until the slowest plan is longer."""
        known = [
            Stretch(segment.first_step, segment.first_tokens, segment.batch_size, segment.seq_len)
            for segment in self.plan.segments
            if segment.first_step < step
        ]
        held = Level(value=seq_len, begins=step, in_tokens=False)
        lengths = (held, *(level for level in self._slowest if level.value > seq_len))
        batch_sizes = batch_ladder(None, self._config.training.batch_size)
        rest = climb(lengths, batch_sizes, step=step, tokens=self.plan.tokens_at_step(step))
        if known and known[-1].seq_len == seq_len:
            rest = rest[1:]
        return self._plan_of([*known, *rest])

    def _plan_of(self, stretches: list[Stretch]) -> TrainingPlan:
        return replace(TrainingPlan.from_stretches(self._config, stretches), most_samples=self.plan.most_samples)
