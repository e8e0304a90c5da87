"""Adaptive pacing: every few steps the length grows, holds or steps back, between a fastest and a slowest linear plan.

At any moment there is a whole plan: what was decided so far, and then the present length, held wherever the slowest
plan allows it. A decision replaces it by a plan that agrees with it up to the step of the decision. So everything that
asks a plan (the loader, the learning rate, the end of the run) works as under fixed pacing, and the run has no special
end: it lasts until its budget is consumed.

Why the cost is bounded: with L_slow <= L <= L_fast at every point (a step count, or a token count for bounds in
tokens), tokens consumed after t steps are at least those of the slowest plan and at most those of the fastest, by
induction over t, since both lengths rise. The run therefore takes at most as many steps, and under ``truncate`` draws
at most as many samples, as the slowest plan.

What the learning rate of a step depends on lies in its past: the pacing's checks see to it that the decay ends at
a known token count, and the end of the warmup is known once it is there.

The loss ratio that decides is the paper's (loss over the lowest earlier loss), with two changes:

- It is the median of the last few steps' ratios, and the lowest loss is that of medians. The ratio of single steps
  counts the noise of the data, above all in small batches, and one bad batch should not decide.
- The lowest loss is the lowest one reached at the step's length or a shorter one. Loss per token falls with the length,
  because later tokens have more context; after a step back to a shorter length, a comparison with losses at the longer
  one would show an instability that is none. While lengths only rise, this is the lowest of all earlier losses.

A loss that is not finite counts as infinite.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Final

from megatron_ext.curriculum.guards import check_complete, ratio_to
from megatron_ext.curriculum.pacing import RunSpec
from megatron_ext.curriculum.pacings import AdaptivePacing
from megatron_ext.curriculum.plan import Action, Decision, PlannedStep, Schedule, TrainingPlan, bounding_plans
from megatron_ext.curriculum.segments import Level, Phase, phases_of, value_at

_VARIANCES: Final = 32  # measurements of which the running median of the variance is taken
_FEWEST: Final = 8  # measurements without which it is not: Adam's second moment needs some steps to fill


@dataclass(frozen=True)
class Instability:
    """The largest values since the last decision; None where there was nothing to take them of."""

    loss_ratio: float | None  # median of loss over lowest earlier loss; below 1 where losses only fell
    # Largest element of sqrt(Adam's second moment) over its running median before.
    variance_ratio: float | None


class InstabilityTracker:
    """Looks at every step and sums up the steps between two decisions. Plain numbers; the same in every process."""

    def __init__(self, *, smoothing: int) -> None:
        """Losses count as the median of ``smoothing`` steps."""
        self._smoothing = smoothing
        # Of the last steps: length and loss.
        self._losses: list[tuple[int, float]] = []
        # [length, lowest median loss at it]: lengths rise and losses fall, so the last entry up to a length is the
        # lowest loss at that length or a shorter one.
        self._lowest: list[tuple[int, float]] = []
        self._variances: list[float] = []
        self._loss_ratio: float | None = None
        self._variance_ratio: float | None = None

    @property
    def seen(self) -> Instability:
        """The steps since the last decision."""
        return Instability(self._loss_ratio, self._variance_ratio)

    def observe(self, *, seq_len: int, loss: float, variance: float | None) -> None:
        """Take a step: its length in tokens, its loss, and the largest sqrt of the second moment if it was measured."""
        self._losses = [*self._losses, (seq_len, loss if math.isfinite(loss) else math.inf)][-self._smoothing :]
        if len(self._losses) == self._smoothing:
            ratio = median(ratio_to(each, self._lowest_up_to(length)) for length, each in self._losses)
            self._loss_ratio = _larger(self._loss_ratio, ratio)
            smooth = median(each for _, each in self._losses)
            if math.isfinite(smooth):
                self._lower(max(length for length, _ in self._losses), smooth)
        if variance is None:
            return
        variance = variance if math.isfinite(variance) else math.inf
        if len(self._variances) >= _FEWEST:
            self._variance_ratio = _larger(self._variance_ratio, ratio_to(variance, float(median(self._variances))))
        self._variances = [*self._variances, variance][-_VARIANCES:]

    def next_interval(self, *, shorter: bool) -> None:
        """Begin anew after a decision. Steps that led to a ``shorter`` length shall not count again after it."""
        self._loss_ratio = self._variance_ratio = None
        if shorter:
            self._losses = []

    def state_dict(self) -> dict[str, Any]:
        """Everything that later ratios depend on, as JSON values (with Python's spelling of infinity)."""
        return {
            "losses": [[seq_len, loss] for seq_len, loss in self._losses],
            "lowest": [[seq_len, loss] for seq_len, loss in self._lowest],
            "variances": list(self._variances),
            "loss_ratio": self._loss_ratio,
            "variance_ratio": self._variance_ratio,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Raises UserError if a key is missing."""
        check_complete(state, self.state_dict(), "pacing")
        self._losses = [(int(seq_len), float(loss)) for seq_len, loss in state["losses"]]
        self._lowest = [(int(seq_len), float(loss)) for seq_len, loss in state["lowest"]]
        self._variances = [float(variance) for variance in state["variances"]]
        self._loss_ratio, self._variance_ratio = state["loss_ratio"], state["variance_ratio"]

    def _lowest_up_to(self, seq_len: int) -> float | None:
        index = bisect_right(self._lowest, seq_len, key=lambda entry: entry[0])
        return self._lowest[index - 1][1] if index else None

    def _lower(self, seq_len: int, loss: float) -> None:
        before = self._lowest_up_to(seq_len)
        if before is not None and before <= loss:
            return
        shorter = [entry for entry in self._lowest if entry[0] < seq_len]
        longer = [entry for entry in self._lowest if entry[0] > seq_len and entry[1] < loss]
        self._lowest = [*shorter, (seq_len, loss), *longer]


class AdaptiveSchedule(Schedule):
    """A plan that is decided as the run goes. One process decides (``decide``), all processes ``apply``."""

    def __init__(self, pacing: AdaptivePacing, run: RunSpec) -> None:
        """Begin a run. Raises UserError as TrainingPlan.build does."""
        super().__init__(TrainingPlan.build(pacing, run))
        self._pacing, self._run = pacing, run
        self._bounds = bounding_plans(pacing, run)
        self._fastest, self._slowest = (bound.levels(run.seq_len) for bound in pacing.bounds().values())
        self._growth = pacing.growth or self._default_growth()
        self._back = pacing.back or self._growth
        self._tracker = InstabilityTracker(smoothing=pacing.smoothing)
        self._last_ratio: float | None = None

    def observe(self, *, seq_len: int, loss: float, variance: float | None = None) -> None:
        self._tracker.observe(seq_len=seq_len, loss=loss, variance=variance)

    def due(self, after: PlannedStep) -> bool:
        """Every interval, until the slowest plan has reached its end."""
        step, tokens = after.end_step, after.end_tokens
        open_ended = value_at(self._slowest, step=step, tokens=tokens) < self._slowest[-1].value
        return step % self._pacing.interval == 0 and step < self.plan.steps and open_ended

    def decide(self, after: PlannedStep) -> Decision:
        step, tokens = after.end_step, after.end_tokens
        seen = self._tracker.seen
        action, reason = self._action(seen)
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

    def apply(self, decision: Decision) -> None:
        if decision.seq_len != self.plan[decision.step].seq_len:
            self._plan = self._replanned(decision.step, decision.seq_len)
        self._last_ratio = decision.loss_ratio
        self._tracker.next_interval(shorter=decision.seq_len < decision.previous)

    def to_json(self) -> dict[str, Any]:
        """The plan as it stands, and the two between which it stays."""
        return self.plan.to_json() | {"bounds": {which: plan.to_json() for which, plan in self._bounds.items()}}

    def state_dict(self) -> dict[str, Any]:
        """The plan's lengths, each with its first step, and what was measured since the last decision."""
        return {
            "lengths": [[segment.first_step, segment.seq_len] for segment in self.plan.segments],
            "last_ratio": self._last_ratio,
            "watch": self._tracker.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` returned. Raises UserError if a key is missing."""
        check_complete(state, self.state_dict(), "pacing")
        batch_size = self._run.batch_size
        phases: list[Phase] = []
        tokens = 0
        for first_step, seq_len in state["lengths"]:
            if phases:
                tokens += (first_step - phases[-1].first_step) * batch_size * phases[-1].seq_len
            phases.append(Phase(first_step, tokens, batch_size, seq_len))
        self._plan = self._plan_of(phases)
        self._last_ratio = state["last_ratio"]
        self._tracker.load_state_dict(state["watch"])

    def _action(self, seen: Instability) -> tuple[Action, str]:
        pacing, ratio, variance = self._pacing, seen.loss_ratio, seen.variance_ratio
        if ratio is None:
            return "hold", "no loss was judged"
        if ratio > pacing.back_above:
            # A run that recovers is left alone: it needs no second step back.
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
            Phase(segment.first_step, segment.first_tokens, segment.batch_size, segment.seq_len)
            for segment in self.plan.segments
            if segment.first_step < step
        ]
        held = Level(value=seq_len, begins=step, in_tokens=False)
        lengths = (held, *(level for level in self._slowest if level.value > seq_len))
        rest = phases_of(lengths, self._run.batch_sizes(), step=step, tokens=self.plan.tokens_at_step(step))
        if known and known[-1].seq_len == seq_len:
            rest = rest[1:]
        return self._plan_of([*known, *rest])

    def _plan_of(self, phases: list[Phase]) -> TrainingPlan:
        return replace(
            TrainingPlan.of_segments(self._run.segments(phases), self._run), most_samples=self.plan.most_samples
        )


def _larger(before: float | None, ratio: float) -> float:
    return ratio if before is None else max(before, ratio)
