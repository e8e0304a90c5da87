"""The criterion; and the search against probing every pair of start length and T."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.experiments.tune_search import Candidate, Outcome, Point, Verdict, next_step, paths, verdict_of
from tests.experiments.planted import BEGINNING, STARTS, Planted, grid, search

law = settings(max_examples=150, deadline=None)


@st.composite
def planted(draw: Any, count: int = 16) -> Planted:
    durations = grid(count).durations[STARTS[0]]
    limits = {start: draw(st.sampled_from((0, *durations))) for start in STARTS}
    return Planted(shortest=draw(st.sampled_from(STARTS)), limits=limits)


@law
@given(st.data(), st.integers(1, 30))
def test_where_verdicts_are_monotone_the_answer_is_that_of_exhaustive_search(data: Any, count: int) -> None:
    planted_run = data.draw(planted(count))
    outcome, verdicts = search(grid(count), planted_run.probe)
    assert len(planted_run.asked) == len(set(planted_run.asked)) == len(verdicts), "no probe is run twice"
    expected, _ = planted_run.exhaustive(grid(count))
    assert outcome.best == expected
    assert not any("chance" in note for note in outcome.notes)


# Where only the longest start works, every other pair ends early and costs nothing. Then both search one range of T,
# and 17 answers (16 T or none) take at least 5 of its 16 probes to tell apart.
@pytest.mark.parametrize(("shortest", "share"), [(8, 0.25), (16, 0.25), (32, 0.25), (64, 0.25), (128, 0.42)])
def test_a_quarter_of_the_exhaustive_cost_is_enough(shortest: int, share: float) -> None:
    over = grid(16)
    for limit in (0, *over.durations[8]):
        planted_run = Planted(shortest, dict.fromkeys(STARTS, limit))
        outcome, verdicts = search(over, planted_run.probe)
        best, cost = planted_run.exhaustive(over)
        assert outcome.best == best
        assert sum(verdict.tokens for verdict in verdicts.values()) <= share * cost
        assert len(verdicts) <= 4 + 1 + 4  # shorter starts, the first T, 16 T by halves


@pytest.mark.parametrize("shortest", STARTS)
def test_a_grid_without_early_ends_costs_fourteen_times_as_much(shortest: int) -> None:
    over = grid(16)
    stable = Planted(0, dict.fromkeys(STARTS, 10**6))
    whole = sum(stable.probe(Candidate(start, steps)).tokens for start in STARTS for steps in over.durations[start])
    for limit in (0, *over.durations[8]):
        _, verdicts = search(over, Planted(shortest, dict.fromkeys(STARTS, limit)).probe)
        assert sum(verdict.tokens for verdict in verdicts.values()) <= whole / 14


@law
@given(st.data())
def test_where_chance_decides_the_answer_stands_on_two_stable_durations_or_says_so(data: Any) -> None:
    planted_run, over = data.draw(planted()), grid(16)
    candidates = [Candidate(start, steps) for start in STARTS for steps in over.durations[start]]
    planted_run.chance = data.draw(st.dictionaries(st.sampled_from(candidates), st.booleans(), max_size=40))
    outcome, verdicts = search(over, planted_run.probe)
    chance = any("chance" in note for note in outcome.notes)
    if outcome.best is None:
        assert not all(verdict.stable for verdict in verdicts.values())
        return
    assert verdicts[outcome.best].stable
    durations = over.durations[outcome.best.start]
    at = durations.index(outcome.best.duration)
    if at + 1 < len(durations):
        above = Candidate(outcome.best.start, durations[at + 1])
        # After a verdict was taken for chance, the T above the answer may be the stable one that was not believed.
        assert not verdicts[above].stable or chance
    if at > 0 and not chance:
        assert verdicts[Candidate(outcome.best.start, durations[at - 1])].stable


def test_a_stable_duration_above_a_fluctuating_one_is_not_believed() -> None:
    over = grid(16)
    durations = over.durations[8]
    planted_run = Planted(8, dict.fromkeys(STARTS, durations[13]))
    planted_run.chance = {Candidate(8, durations[12]): False}
    outcome, _ = search(over, planted_run.probe)
    assert over.first == durations[11]
    assert outcome.best == Candidate(8, durations[11])
    assert f"T = {durations[13]:,} did not fluctuate although the smaller {durations[12]:,} did" in outcome.notes[0]


def test_only_a_fluctuation_at_the_beginning_asks_for_a_longer_start() -> None:
    over = grid(8)
    late = Verdict(fluctuated_at=BEGINNING + 1, worst_ratio=2.0, tokens=1)
    early = Verdict(fluctuated_at=BEGINNING, worst_ratio=2.0, tokens=1)
    first = Candidate(8, over.first)
    assert next_step(over, {}) == first
    assert next_step(over, {first: early}) == Candidate(16, over.first)
    asked = next_step(over, {first: late})
    assert isinstance(asked, Candidate)
    assert asked.start == 8
    assert asked.duration < over.first


def test_notes_say_where_nothing_is_found_and_where_the_grid_ends() -> None:
    over = grid(8)
    outcome, verdicts = search(over, Planted(10**6, {}).probe)
    assert (outcome.best, len(verdicts)) == (None, len(STARTS))
    assert "every start length (8, 16, 32, 64, 128) fluctuates" in outcome.notes[0]
    planted_run = Planted(8, dict.fromkeys(STARTS, 10**6))
    outcome, _ = search(over, planted_run.probe)
    assert outcome.best == Candidate(8, over.durations[8][-1])
    assert "largest that was offered" in outcome.notes[-1]


FORESEEN = {frozenset(path) for path in paths(grid(16))}


@law
@given(planted())
def test_every_real_path_is_among_those_foreseen(planted_run: Planted) -> None:
    over = grid(16)
    _, verdicts = search(over, planted_run.probe)
    assert frozenset(verdicts) in FORESEEN


@law
@given(planted(), st.integers(0, 12))
def test_a_search_goes_on_from_what_is_known(planted_run: Planted, stopped_after: int) -> None:
    over = grid(16)
    whole, verdicts = search(over, planted_run.probe)
    known = dict(list(verdicts.items())[:stopped_after])
    planted_run.asked.clear()
    again, _ = search(over, planted_run.probe, known=known)
    assert again == whole
    assert len(planted_run.asked) == len(verdicts) - len(known)
    assert isinstance(next_step(over, verdicts), Outcome)


def decided(
    *perplexities: float, threshold: float = 1.3, initial: float = 100.0, broken: tuple[int, ...] = ()
) -> Verdict:
    points = [Point(10 * number, value) for number, value in enumerate(perplexities, start=1)]
    return verdict_of(points, threshold=threshold, initial=initial, tokens=7, broken_steps=broken)


@pytest.mark.parametrize(
    ("perplexities", "fluctuated_at", "worst"),
    [
        ([], None, 0.0),
        ([90.0, 50.0, 64.0, 40.0], None, 64.0 / 50.0),
        ([50.0, 60.0, 66.0, 10.0, 99.0], 30, 9.9),
        ([500.0, 90.0, 80.0], 10, 5.0),
        ([50.0, math.nan, 40.0], 20, math.inf),
        ([50.0, math.inf, 40.0], 20, math.inf),
    ],
)
def test_the_first_significant_rise_over_the_best_so_far_counts(
    perplexities: list[float], fluctuated_at: int | None, worst: float
) -> None:
    assert decided(*perplexities) == Verdict(fluctuated_at, worst, tokens=7)


def test_exactly_the_threshold_is_not_above_it_and_a_broken_step_counts_at_once() -> None:
    assert decided(50.0, 75.0, threshold=1.5).stable
    assert decided(50.0, 40.0, broken=(13, 14)) == Verdict(13, math.inf, tokens=7)


@given(st.lists(st.floats(1.0, 1e6), max_size=20), st.floats(1.01, 5.0))
def test_stable_means_no_value_above_threshold_times_any_earlier_one(values: list[float], threshold: float) -> None:
    verdict = decided(*values, threshold=threshold, initial=1e3)
    rises = [10 * (index + 1) for index, value in enumerate(values) if value / min([1e3, *values[:index]]) > threshold]
    assert verdict.fluctuated_at == (rises[0] if rises else None)
