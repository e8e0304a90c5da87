"""The search for start length and warmup duration, as a function of the verdicts that are known so far.

``next_step`` says which probe has to be run next, or what the search found. It remembers nothing: whoever keeps the
verdicts can stop at any moment, and it can be asked in advance about every path that a search might take.

The paper's procedure (and the DeepSpeed tutorial's): with T a few multiples of the learning rate's warmup, raise the
start length s until validation perplexity no longer fluctuates at the very beginning; then find the largest T without a
significant fluctuation by binary search. A binary search assumes that fluctuations begin at some T and stay from
there on. Where a probe is at the edge, chance decides, and that need not hold; so an answer counts only if the T
below it is free of fluctuations too. If it is not, the answer is taken for chance, the search goes on below, and
``Outcome.notes`` says so.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
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


def verdict_of(
    points: Iterable[Point],
    *,
    threshold: float,
    initial: float,
    tokens: int,
    broken_steps: Sequence[int] = (),
) -> Verdict:
    """The paper's criterion: perplexity above ``threshold`` times the best so far is significant.

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


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A curriculum to probe."""

    start: int
    """s: length of the first step, in tokens."""

    duration: int
    """T: steps until the full length."""


@dataclass(frozen=True)
class Grid:
    """What is searched."""

    durations: Mapping[int, tuple[int, ...]]
    """For each start length, rising, the T in steps, rising; each holds ``first``."""

    first: int
    """T with which start lengths are compared."""

    beginning: int
    """A fluctuation up to this step is one at the very beginning, which a longer start is to cure."""


@dataclass(frozen=True)
class Outcome:
    """The end of a search."""

    best: Candidate | None
    """None where nothing was free of fluctuations."""

    notes: tuple[str, ...]
    """What whoever uses the answer has to know."""


Verdicts = Mapping[Candidate, Verdict]


def next_step(grid: Grid, verdicts: Verdicts) -> Candidate | Outcome:
    """The probe to run next given the verdicts known so far, or the outcome when they are enough."""
    path = _search_path(grid)
    try:
        asked = next(path)
        while asked in verdicts:
            asked = path.send(verdicts[asked])
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome
    return asked


def paths(grid: Grid, verdicts: Verdicts | None = None) -> Iterator[Verdicts]:
    """Every path that the search can take from ``verdicts`` on: its probes with the verdicts that lead it there.

    A verdict is one of three: no fluctuation, one at the very beginning (in step ``grid.beginning``), a later one.
    """
    verdicts = verdicts or {}
    step = next_step(grid, verdicts)
    if isinstance(step, Outcome):
        yield verdicts
        return
    after: list[int | None] = [None, grid.beginning + 1]
    if step.duration == grid.first:
        after.append(grid.beginning)
    for fluctuated_at in after:
        verdict = Verdict(fluctuated_at=fluctuated_at, worst_ratio=1.0, tokens=0)
        yield from paths(grid, {**verdicts, step: verdict})


def _search_path(grid: Grid) -> Generator[Candidate, Verdict, Outcome]:
    """Asks for probes by yielding them; may ask again for one that is known."""
    for start, durations in grid.durations.items():
        verdict = yield Candidate(start, grid.first)
        if verdict.fluctuated_at is None or verdict.fluctuated_at > grid.beginning:
            return (yield from _longest(start, durations, at=durations.index(grid.first), stable=verdict.stable))
    tried = ", ".join(str(start) for start in grid.durations)
    note = f"every start length ({tried}) fluctuates within the first {grid.beginning:,} steps"
    return Outcome(best=None, notes=(note,))


def _longest(
    start: int, durations: tuple[int, ...], *, at: int, stable: bool
) -> Generator[Candidate, Verdict, Outcome]:
    """The largest T of ``durations``, where the verdict on the one at index ``at`` is known."""
    lowest = at if stable else -1
    found = yield from _bisect(start, durations, low=lowest, high=len(durations) if stable else at)
    notes: list[str] = []
    if found > 0 and not (yield Candidate(start, durations[found - 1])).stable:
        notes.append(
            f"T = {durations[found]:,} did not fluctuate although the smaller {durations[found - 1]:,} did: this "
            "was taken for chance and the search went on below; a longer probe or more validation samples tell more"
        )
        found = yield from _bisect(start, durations, low=lowest, high=found - 1)
    if found < 0:
        return Outcome(best=None, notes=(*notes, f"with start length {start} every T that was probed fluctuates"))
    if found == len(durations) - 1:
        notes.append(f"T = {durations[found]:,} is the largest that was offered: a larger one might do too")
    return Outcome(best=Candidate(start, durations[found]), notes=tuple(notes))


def _bisect(start: int, durations: tuple[int, ...], *, low: int, high: int) -> Generator[Candidate, Verdict, int]:
    """Index of the last stable T before a fluctuating one; ``low`` counts as stable and ``high`` as fluctuating."""
    while high - low > 1:
        middle = (low + high) // 2
        verdict = yield Candidate(start, durations[middle])
        if verdict.stable:
            low = middle
        else:
            high = middle
    return low
