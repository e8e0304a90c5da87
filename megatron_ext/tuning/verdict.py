"""When a probe's validation perplexity fluctuates significantly, and what a probe found."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Point:
    """One validation of a probe."""

    step: int
    """Finished steps."""

    perplexity: float
    """At full length; NaN or infinite where the model diverged."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a probe, or its beginning so far, shows."""

    fluctuated_at: int | None
    """Finished steps at the first significant fluctuation; None: there was none."""

    worst_ratio: float
    """Largest perplexity over the best before it; infinite where a loss was not finite."""

    tokens: int
    """Tokens trained."""

    @property
    def stable(self) -> bool:
        """Whether perplexity never fluctuated significantly."""
        return self.fluctuated_at is None


def judge(
    points: Iterable[Point],
    *,
    threshold: float,
    initial: float,
    tokens: int,
    broken_steps: Sequence[int] = (),
) -> Verdict:
    """Judge a probe by the paper's criterion: perplexity above ``threshold`` times the best so far is significant.

    Args:
        points: Validations in order.
        threshold: 1.3 in the paper's experiments.
        initial: Best perplexity before the first validation: the vocabulary's size, which an untrained model has. So a
            run that explodes before its first validation is found by it.
        tokens: Tokens trained.
        broken_steps: Finished steps after which the training loss was not finite: the model is lost, whatever was
            validated.
    """
    best, worst, first = initial, 0.0, None
    for point in points:
        ratio = point.perplexity / best if math.isfinite(point.perplexity) else math.inf
        worst = max(worst, ratio)
        if ratio > threshold and first is None:
            first = point.step
        best = min(best, point.perplexity) if math.isfinite(point.perplexity) else best
    if broken_steps:
        worst, first = math.inf, min(broken_steps) if first is None else min(first, *broken_steps)
    return Verdict(fluctuated_at=first, worst_ratio=worst, tokens=tokens)
