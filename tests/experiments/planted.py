"""Planted problems: which probes fluctuate is known, and what each costs follows from the pacing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_ext.experiments.tune_search import Candidate, Grid, Outcome, Verdict, Verdicts, next_step

FULL, UNIT = 1024, 50
STEPS, BEGINNING, BATCH = 2 * UNIT, UNIT, 4
STARTS = (8, 16, 32, 64, 128)


def durations(count: int, ratio: float = 1.1) -> tuple[int, ...]:
    """Values of T from one unit on."""
    steps = [UNIT]
    while len(steps) < count:
        steps.append(max(steps[-1] + 1, round(steps[-1] * ratio)))
    return tuple(steps)


def grid(count: int, starts: Sequence[int] = STARTS) -> Grid:
    """The same durations for every start, compared at the T next to three units."""
    steps = durations(count)
    first = min(steps, key=lambda value: abs(value - 3 * UNIT))
    return Grid(durations=dict.fromkeys(starts, steps), first=first, beginning=BEGINNING)


def search(
    grid: Grid, probe: Callable[[Candidate], Verdict], *, known: Verdicts | None = None
) -> tuple[Outcome, dict[Candidate, Verdict]]:
    """Search to the end with ``probe``; returns the outcome and all verdicts, those in ``known`` included."""
    verdicts = dict(known or {})
    while isinstance(step := next_step(grid, verdicts), Candidate):
        verdicts[step] = probe(step)
    return step, verdicts


@dataclass
class Planted:
    """Starts below ``shortest`` fluctuate at the beginning; from there on every T above its start's limit does."""

    shortest: int
    limits: Mapping[int, int]
    """Largest T without a fluctuation, for each start."""

    chance: Mapping[Candidate, bool] = field(default_factory=dict)
    """Verdicts that chance decides: whether the candidate is stable."""

    asked: list[Candidate] = field(default_factory=list)
    """Every probe that was run."""

    def probe(self, candidate: Candidate) -> Verdict:
        """Run a probe."""
        self.asked.append(candidate)
        if candidate.start < self.shortest:
            at: int | None = BEGINNING // 5
        else:
            stable = self.chance.get(candidate, candidate.duration <= self.limits[candidate.start])
            at = None if stable else BEGINNING + BEGINNING // 2
        return Verdict(fluctuated_at=at, worst_ratio=1.0 if at is None else 2.0, tokens=_tokens(candidate, at or STEPS))

    def exhaustive(self, over: Grid) -> tuple[Candidate | None, int]:
        """The best candidate by the paper's rule when every pair is probed, and the tokens of that."""
        verdicts = {
            Candidate(start, steps): self.probe(Candidate(start, steps))
            for start, steps_of in over.durations.items()
            for steps in steps_of
        }
        tokens = sum(verdict.tokens for verdict in verdicts.values())
        for start, steps_of in over.durations.items():
            first = verdicts[Candidate(start, over.first)]
            if first.stable or (first.fluctuated_at or 0) > over.beginning:
                stable = [steps for steps in steps_of if verdicts[Candidate(start, steps)].stable]
                return (Candidate(start, max(stable)) if stable else None), tokens
        return None, tokens


def _tokens(candidate: Candidate, steps: int) -> int:
    progress = np.minimum(np.arange(steps) / candidate.duration, 1.0)
    lengths = (candidate.start + (FULL - candidate.start) * progress).astype(np.int64) // 8 * 8
    return int(BATCH * lengths.sum())
