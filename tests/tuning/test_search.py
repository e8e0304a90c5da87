"""The search against probing every pair of start length and T."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.tuning.search import Candidate, Outcome, courses, next_step, search
from megatron_ext.tuning.verdict import Verdict
from tests.tuning.planted import BEGINNING, STARTS, Planted, grid

law = settings(max_examples=150, deadline=None)


@st.composite
def planted(draw: Any, notches: int = 16) -> Planted:
    ladder = grid(notches).ladders[STARTS[0]]
    limits = {start: draw(st.sampled_from((0, *ladder))) for start in STARTS}
    return Planted(shortest=draw(st.sampled_from(STARTS)), limits=limits)


@law
@given(st.data(), st.integers(1, 30))
def test_where_verdicts_are_monotone_the_answer_is_that_of_exhaustive_search(data: Any, notches: int) -> None:
    problem = data.draw(planted(notches))
    outcome, verdicts = search(grid(notches), problem.probe)
    assert len(problem.asked) == len(set(problem.asked)) == len(verdicts), "no probe is run twice"
    expected, _ = problem.exhaustive(grid(notches))
    assert outcome.best == expected
    assert not any("chance" in note for note in outcome.notes)


# Where only the longest start works, every other pair ends early and costs nothing. Then both search one ladder, and
# 17 answers (16 notches or none) take at least 5 of its 16 probes to tell apart.
@pytest.mark.parametrize(("shortest", "share"), [(8, 0.25), (16, 0.25), (32, 0.25), (64, 0.25), (128, 0.42)])
def test_a_quarter_of_the_exhaustive_cost_is_enough(shortest: int, share: float) -> None:
    over = grid(16)
    for limit in (0, *over.ladders[8]):
        problem = Planted(shortest, dict.fromkeys(STARTS, limit))
        outcome, verdicts = search(over, problem.probe)
        best, cost = problem.exhaustive(over)
        assert outcome.best == best
        assert sum(verdict.tokens for verdict in verdicts.values()) <= share * cost
        assert len(verdicts) <= 4 + 1 + 4  # shorter starts, the first T, 16 notches by halves


@pytest.mark.parametrize("shortest", STARTS)
def test_a_grid_without_early_ends_costs_fourteen_times_as_much(shortest: int) -> None:
    over = grid(16)
    stable = Planted(0, dict.fromkeys(STARTS, 10**6))
    whole = sum(stable.probe(Candidate(start, steps)).tokens for start in STARTS for steps in over.ladders[start])
    for limit in (0, *over.ladders[8]):
        _, verdicts = search(over, Planted(shortest, dict.fromkeys(STARTS, limit)).probe)
        assert sum(verdict.tokens for verdict in verdicts.values()) <= whole / 14


@law
@given(st.data())
def test_where_chance_decides_the_answer_stands_on_two_stable_notches_or_says_so(data: Any) -> None:
    problem, over = data.draw(planted()), grid(16)
    candidates = [Candidate(start, steps) for start in STARTS for steps in over.ladders[start]]
    problem.chance = data.draw(st.dictionaries(st.sampled_from(candidates), st.booleans(), max_size=40))
    outcome, verdicts = search(over, problem.probe)
    chance = any("chance" in note for note in outcome.notes)
    if outcome.best is None:
        assert not all(verdict.stable for verdict in verdicts.values())
        return
    assert verdicts[outcome.best].stable
    ladder = over.ladders[outcome.best.start]
    at = ladder.index(outcome.best.duration)
    if at + 1 < len(ladder):
        above = Candidate(outcome.best.start, ladder[at + 1])
        # After a verdict was taken for chance, the notch above the answer may be the stable one that was not believed.
        assert not verdicts[above].stable or chance
    if at > 0 and not chance:
        assert verdicts[Candidate(outcome.best.start, ladder[at - 1])].stable


def test_a_stable_notch_above_a_fluctuating_one_is_not_believed() -> None:
    over = grid(16)
    ladder = over.ladders[8]
    problem = Planted(8, dict.fromkeys(STARTS, ladder[13]))
    problem.chance = {Candidate(8, ladder[12]): False}
    outcome, _ = search(over, problem.probe)
    assert over.first == ladder[11]
    assert outcome.best == Candidate(8, ladder[11])
    assert f"T = {ladder[13]:,} did not fluctuate although the smaller {ladder[12]:,} did" in outcome.notes[0]


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


def test_nothing_is_found_where_every_start_fluctuates() -> None:
    outcome, verdicts = search(grid(8), Planted(10**6, {}).probe)
    assert outcome.best is None
    assert len(verdicts) == len(STARTS)
    assert "every start length (8, 16, 32, 64, 128) fluctuates" in outcome.notes[0]


def test_the_largest_offered_is_said_to_be_the_end_of_the_ladder() -> None:
    over = grid(8)
    problem = Planted(8, dict.fromkeys(STARTS, 10**6))
    outcome, _ = search(over, problem.probe)
    assert outcome.best == Candidate(8, over.ladders[8][-1])
    assert "largest that was offered" in outcome.notes[-1]


@law
@given(planted())
def test_every_real_course_is_among_those_foreseen(problem: Planted) -> None:
    over = grid(16)
    _, verdicts = search(over, problem.probe)
    foreseen = {frozenset(course) for course in COURSES}
    assert frozenset(verdicts) in foreseen


COURSES = list(courses(grid(16)))


@law
@given(planted(), st.integers(0, 12))
def test_a_search_goes_on_from_what_is_known(problem: Planted, stopped_after: int) -> None:
    over = grid(16)
    whole, verdicts = search(over, problem.probe)
    known = dict(list(verdicts.items())[:stopped_after])
    problem.asked.clear()
    again, _ = search(over, problem.probe, known=known)
    assert again == whole
    assert len(problem.asked) == len(verdicts) - len(known)
    assert isinstance(next_step(over, verdicts), Outcome)
