"""Ladders: the formula solved for the step, against the formula evaluated."""

from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ext.base import Duration
from megatron_ext.curriculum.pacing import Ladder, discrete, rising
from tests.curriculum.runs import formula_value, property_test


def value_at(ladder: Ladder, progress: int) -> int:
    return [level.value for level in ladder if level.begins <= progress][-1]


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
    ladder = rising(start, end, multiple=multiple, duration=Duration(tokens=total), degree=degree)
    pacing = {"start": start, "multiple": multiple, "duration": {"tokens": total}, "degree": degree}
    for progress in range(total + 3):
        assert value_at(ladder, progress) == formula_value(pacing, end=end, progress=progress)
    assert value_at(ladder, total) == end
    assert jumps == 0 or value_at(ladder, total - 1) < end
    assert all(level.in_tokens for level in ladder)
    begins = [level.begins for level in ladder]
    assert begins == sorted(set(begins))


def test_thresholds_stay_exact_where_floats_do_not() -> None:
    total = 2**53 - 1
    ladder = rising(8, 1024, multiple=8, duration=Duration(steps=total), degree=3)
    assert ladder[1].begins == -(-total * 8**3 // 1016**3)
    assert ladder[-1].begins == total


def test_discrete_durations_count_from_their_own_stage() -> None:
    ladder = discrete([(8, Duration(steps=5)), (16, Duration(tokens=100))], full=32)
    assert [(level.value, level.begins, level.in_tokens, level.from_previous) for level in ladder] == [
        (8, 0, False, False),
        (16, 5, False, True),
        (32, 100, True, True),
    ]
