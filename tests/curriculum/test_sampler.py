"""The sampler against a brute-force reading of the stream, token by token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.sampler import (
    BatchSlices,
    SkippedSamples,
    check_batches_divide,
    global_batch,
    micro_batch_sizes,
    positions_between,
    rank_block,
)
from megatron_ext.errors import UserError
from tests.curriculum.runs import Case, cases, property_test, run_config


def tokens_read(batch: BatchSlices, seq_len: int) -> list[list[tuple[int, int]]]:
    """(sample, position) of every token that each sequence reads."""
    rows = []
    for sample, offset, following in zip(batch.samples, batch.offsets, batch.next_samples, strict=True):
        stream = [(int(sample), position) for position in range(int(offset), seq_len)]
        if following >= 0:
            stream += [(int(following), position) for position in range(seq_len)]
        assert len(stream) >= batch.seq_len
        rows.append(stream[: batch.seq_len])
    return rows


@property_test
@given(cases(tail="recycle"))
def test_recycle_reads_every_token_of_the_stream_exactly_once(case: Case) -> None:
    plan = case.config.plan()
    batch_size, seq_len = case.config.training.batch_size, plan.seq_len
    streams: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
    opened: set[int] = set()
    for step in plan:
        rows = tokens_read(global_batch(plan, step.step), seq_len)
        assert step.consumed_samples == len(opened)
        for stream, row in zip(streams, rows, strict=True):
            stream.extend(row)
            opened |= {sample for sample, _ in row}
    assert plan.samples == len(opened) == max(opened) + 1
    drawn = [plan[segment.first_step].consumed_samples for segment in plan.segments]
    assert [segment.first_samples for segment in plan.segments] == drawn
    used = Counter(token for stream in streams for token in stream)
    assert set(used.values()) == {1}
    assert used.total() == plan.tokens
    for number, stream in enumerate(streams):
        everything = [
            (sample, position) for sample in range(number, plan.samples, batch_size) for position in range(seq_len)
        ]
        assert stream == everything[: len(stream)]
        assert len(everything) - len(stream) < seq_len  # no sample is asked for that is not needed


@property_test
@given(cases())
def test_truncate_draws_every_sample_once_from_its_beginning(case: Case) -> None:
    plan = case.config.plan()
    batches = [global_batch(plan, step) for step in range(plan.steps)]
    assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(plan.samples))
    for batch, step in zip(batches, plan, strict=True):
        assert len(batch) == step.batch_size
        assert batch.seq_len == step.seq_len
        assert not batch.offsets.any()
        assert (batch.next_samples == -1).all()


@property_test
@given(st.sampled_from(["truncate", "recycle"]).flatmap(lambda tail: cases(tail=tail)), st.data())
def test_the_ranks_blocks_concatenate_to_the_global_batch(case: Case, data: st.DataObject) -> None:
    plan = case.config.plan()
    batch = global_batch(plan, data.draw(st.integers(0, plan.steps - 1)))
    divisors = [ranks for ranks in range(1, len(batch) + 1) if len(batch) % ranks == 0]
    ranks = data.draw(st.sampled_from(divisors))
    blocks = [rank_block(batch, rank, ranks) for rank in range(ranks)]
    assert {len(block) for block in blocks} == {len(batch) // ranks}
    assert {block.seq_len for block in blocks} == {batch.seq_len}
    for name in ("samples", "offsets", "next_samples"):
        parts = [getattr(block, name) for block in blocks]
        assert np.concatenate(parts).tolist() == getattr(batch, name).tolist()


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    plan = run_config(seq_len=8, batch_size=6, duration={"steps": 1}).plan()
    with pytest.raises(UserError, match=r"6 sequences .* 4 data-parallel ranks.*training\.batch_size"):
        rank_block(global_batch(plan, 0), 0, 4)


def test_every_batch_of_a_plan_is_checked() -> None:
    warmup = {"start": 4, "increment": 2, "duration": {"tokens": 400}}
    plan = run_config(seq_len=8, batch_size=8, training={"batch_size_warmup": warmup}, duration={"steps": 100}).plan()
    assert plan.batch_sizes == [4, 6, 8]
    check_batches_divide(plan, 2)
    with pytest.raises(UserError, match=r"a batch of 6 sequences .* 4 data-parallel ranks"):
        check_batches_divide(plan, 4)


@property_test
@given(st.integers(0, 200), st.integers(1, 64), st.integers(1, 4096))
def test_micro_batches_are_as_few_as_fit_and_balanced(sequences: int, seq_len: int, max_tokens: int) -> None:
    if max_tokens < seq_len:
        with pytest.raises(UserError, match=r"parallel\.micro_batch_tokens"):
            micro_batch_sizes(sequences, seq_len, max_tokens)
        return
    sizes = micro_batch_sizes(sequences, seq_len, max_tokens)
    assert sum(sizes) == sequences
    assert all(0 < size * seq_len <= max_tokens for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert (len(sizes) - 1) * (max_tokens // seq_len) < max(sequences, 1)  # one micro-batch fewer would not fit


PARTS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=4)


def skipped_of(total: int, parts: list[tuple[int, int]]) -> SkippedSamples:
    skipped = SkippedSamples(total)
    for first, count in parts:
        skipped = skipped.without(range(first, first + count))
        assume(skipped.left > 0)
    return skipped


def ids(skipped: SkippedSamples) -> set[int]:
    return {sample for first, count in skipped.ranges for sample in range(first, first + count)}


@property_test
@given(total=st.integers(13, 50), parts=PARTS)
def test_one_lap_reads_every_other_sample_once_and_in_order(total: int, parts: list[tuple[int, int]]) -> None:
    skipped = skipped_of(total, parts)
    kept = [sample for sample in range(total) if sample not in ids(skipped)]
    assert skipped.left == len(kept)
    assert skipped.samples(np.arange(2 * len(kept))).tolist() == kept * 2
    assert all(a + count < b for (a, count), (b, _) in zip(skipped.ranges, skipped.ranges[1:], strict=False))


@property_test
@given(total=st.integers(13, 50), parts=PARTS, first=st.integers(0, 40), count=st.integers(1, 12))
def test_what_was_read_at_the_positions_is_skipped_and_nothing_before_them_moves(
    total: int, parts: list[tuple[int, int]], first: int, count: int
) -> None:
    before = skipped_of(total, parts)
    read = set(before.samples(np.arange(first, first + count)).tolist())
    after = before.without(range(first, first + count))
    assert ids(after) == ids(before) | read
    if after.left and first + count <= before.left:
        earlier = np.arange(min(first, after.left))
        assert after.samples(earlier).tolist() == before.samples(earlier).tolist()
    assert before.with_ranges(after.to_json()) == after


def plan_of(tail: str) -> TrainingPlan:
    curriculum = {"pacing": "linear", "start": 8, "duration": {"steps": 30}}
    data = {"tail": tail}
    return run_config(seq_len=32, batch_size=4, duration={"steps": 40}, curriculum=curriculum, data=data).plan()


@property_test
@given(tail=st.sampled_from(["truncate", "recycle"]), to=st.integers(1, 20), length=st.integers(0, 5))
def test_steps_after_a_rollback_read_nothing_that_the_steps_given_up_had_read(tail: str, to: int, length: int) -> None:
    plan = plan_of(tail)
    bad = to + length
    skipped = SkippedSamples.none(plan.samples, plan)
    after = skipped.without(positions_between(plan, to, bad))
    given_up = [global_batch(plan, step) for step in range(to, bad + 1)]
    read = {sample for batch in given_up for sample in (*batch.samples, *batch.next_samples) if sample >= 0}
    for step in range(to, plan.steps):
        plain = global_batch(plan, step)
        batch = after.applied(plain)
        assert not read & {*batch.samples.tolist(), *batch.next_samples.tolist()}
        assert batch.offsets.tolist() == plain.offsets.tolist()
        assert len(set(batch.samples.tolist())) == len(batch)
        if tail == "recycle":
            # Streams keep to their own samples, and a sequence that runs over goes on in the stream's next one.
            assert (batch.samples % 4).tolist() == [0, 1, 2, 3]
            over = batch.next_samples >= 0
            assert (over == (plain.next_samples >= 0)).all()
            assert (batch.next_samples[over] % 4).tolist() == np.arange(4)[over].tolist()
