"""Levels: the formula solved for the step, against the formula evaluated; segments beyond the run."""

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.base import Duration
from megatron_ext.curriculum.segments import (
    Levels,
    constant,
    cut,
    discrete,
    phases_of,
    rising,
    steps_to_reach,
    tokens_after,
)
from tests.curriculum.runs import formula_value, property_test


def value_at(levels: Levels, progress: int) -> int:
    return [level.value for level in levels if level.begins <= progress][-1]


@property_test
@given(
    start=st.integers(1, 9),
    jumps=st.integers(0, 40),
    multiple=st.sampled_from([1, 3, 8, 16]),
    total=st.integers(1, 200),
    degree=st.integers(1, 5),
)
@example(start=1, jumps=10, multiple=1, total=10, degree=1)  # floats: 10 * (3 / 10) is below 3
@example(start=8, jumps=127, multiple=8, total=7, degree=1)  # more lengths than steps
def test_rising_is_the_formula_at_every_step(start: int, jumps: int, multiple: int, total: int, degree: int) -> None:
    start *= multiple
    end = start + jumps * multiple
    levels = rising(start, end, multiple=multiple, duration=Duration(tokens=total), degree=degree)
    pacing = {"start": start, "multiple": multiple, "duration": {"tokens": total}, "degree": degree}
    for progress in range(total + 3):
        assert value_at(levels, progress) == formula_value(pacing, end=end, progress=progress)
    assert value_at(levels, total) == end
    assert jumps == 0 or value_at(levels, total - 1) < end
    assert all(level.in_tokens for level in levels)
    begins = [level.begins for level in levels]
    assert begins == sorted(set(begins))


def test_thresholds_stay_exact_where_floats_do_not() -> None:
    total = 2**53 - 1
    levels = rising(8, 1024, multiple=8, duration=Duration(steps=total), degree=3)
    assert levels[1].begins == -(-total * 8**3 // 1016**3)
    assert levels[-1].begins == total


def test_discrete_durations_count_from_their_own_stage() -> None:
    levels = discrete([(8, Duration(steps=5)), (16, Duration(tokens=100))], full=32)
    assert [(level.value, level.begins, level.in_tokens, level.from_previous) for level in levels] == [
        (8, 0, False, False),
        (16, 5, False, True),
        (32, 100, True, True),
    ]


def test_steps_and_tokens_go_on_beyond_the_end_with_the_last_batch() -> None:
    lengths = rising(8, 24, multiple=8, duration=Duration(steps=4))
    segments = cut(phases_of(lengths, constant(2)), Duration(steps=6))
    assert [(segment.first_step, segment.steps, segment.seq_len) for segment in segments] == [
        (0, 2, 8),
        (2, 2, 16),
        (4, 2, 24),
    ]
    assert tokens_after(segments, 6) == 2 * (8 + 8 + 16 + 16 + 24 + 24)
    assert tokens_after(segments, 9) == tokens_after(segments, 6) + 3 * 48
    assert steps_to_reach(segments, tokens_after(segments, 9)) == 9
    assert steps_to_reach(segments, tokens_after(segments, 9) + 1) == 10
    assert steps_to_reach(segments, 0) == 0


def test_length_and_batch_may_change_at_the_same_step_and_at_different_ones() -> None:
    lengths = rising(8, 16, multiple=8, duration=Duration(steps=3))
    batches = rising(1, 3, multiple=1, duration=Duration(tokens=40))
    phases = phases_of(lengths, batches)
    assert [(s.first_step, s.first_tokens, s.batch_size, s.seq_len) for s in phases] == [
        (0, 0, 1, 8),
        (3, 24, 2, 16),
        (4, 56, 3, 16),
    ]
