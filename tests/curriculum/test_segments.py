"""Segments beyond the run, where the last batch goes on."""

from megatron_ext.base import Duration
from megatron_ext.curriculum.pacing import constant, rising
from megatron_ext.curriculum.segments import climb, cut, steps_to_reach, tokens_after


def test_steps_and_tokens_go_on_beyond_the_end_with_the_last_batch() -> None:
    lengths = rising(8, 24, multiple=8, duration=Duration(steps=4))
    segments = cut(climb(lengths, constant(2)), Duration(steps=6))
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
    stretches = climb(lengths, batches)
    assert [(s.first_step, s.first_tokens, s.batch_size, s.seq_len) for s in stretches] == [
        (0, 0, 1, 8),
        (3, 24, 2, 16),
        (4, 56, 3, 16),
    ]
