"""The sampler against a brute-force reading of the stream, token by token."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.sampler import BatchSlices, SamplePlan, check_batches_divide, micro_batch_sizes, rank_block
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
    plan = TrainingPlan.from_config(case.config)
    batch_size, seq_len = case.config.training.batch_size, plan.seq_len
    lanes: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
    for step in range(plan.steps):
        rows = tokens_read(SamplePlan(plan).slices(step), seq_len)
        assert len({sample for row in rows for sample, _ in row}) >= batch_size
        for lane, row in zip(lanes, rows, strict=True):
            lane.extend(row)
            assert {sample for sample, _ in row} <= {lane_sample for lane_sample, _ in lane}
    used = Counter(token for lane in lanes for token in lane)
    assert set(used.values()) == {1}
    assert used.total() == plan.tokens
    for number, lane in enumerate(lanes):
        everything = [
            (sample, position) for sample in range(number, plan.samples, batch_size) for position in range(seq_len)
        ]
        assert lane == everything[: len(lane)]
        assert len(everything) - len(lane) < seq_len  # no sample is asked for that is not needed


@property_test
@given(cases(tail="recycle"))
def test_recycle_counts_the_samples_it_has_opened(case: Case) -> None:
    plan = TrainingPlan.from_config(case.config)
    opened: set[int] = set()
    for step in plan:
        assert step.consumed_samples == len(opened)
        opened |= {sample for row in tokens_read(SamplePlan(plan).slices(step.step), plan.seq_len) for sample, _ in row}
    assert plan.samples == len(opened) == max(opened) + 1
    assert [segment.first_samples for segment in plan.segments] == [
        plan[segment.first_step].consumed_samples for segment in plan.segments
    ]


@property_test
@given(cases())
def test_truncate_draws_every_sample_once_from_its_beginning(case: Case) -> None:
    plan = TrainingPlan.from_config(case.config)
    batches = [SamplePlan(plan).slices(step) for step in range(plan.steps)]
    assert np.concatenate([batch.samples for batch in batches]).tolist() == list(range(plan.samples))
    for batch, step in zip(batches, plan, strict=True):
        assert len(batch) == step.batch_size
        assert batch.seq_len == step.seq_len
        assert not batch.offsets.any()
        assert (batch.next_samples == -1).all()


@property_test
@given(st.sampled_from(["truncate", "recycle"]).flatmap(lambda tail: cases(tail=tail)), st.data())
def test_the_ranks_blocks_concatenate_to_the_global_batch(case: Case, data: st.DataObject) -> None:
    plan = TrainingPlan.from_config(case.config)
    batch = SamplePlan(plan).slices(data.draw(st.integers(0, plan.steps - 1)))
    divisors = [ranks for ranks in range(1, len(batch) + 1) if len(batch) % ranks == 0]
    ranks = data.draw(st.sampled_from(divisors))
    blocks = [rank_block(batch, rank, ranks) for rank in range(ranks)]
    assert {len(block) for block in blocks} == {len(batch) // ranks}
    assert {block.seq_len for block in blocks} == {batch.seq_len}
    for name in ("samples", "offsets", "next_samples"):
        parts = [getattr(block, name) for block in blocks]
        assert np.concatenate(parts).tolist() == getattr(batch, name).tolist()


@property_test
@given(st.sampled_from(["truncate", "recycle"]).flatmap(lambda tail: cases(tail=tail)), st.data())
def test_a_new_plan_that_starts_anywhere_gives_the_rest_of_the_run(case: Case, data: st.DataObject) -> None:
    def read(sampler: SamplePlan, step: int) -> list[list[tuple[int, int]]]:
        return tokens_read(sampler.slices(step), sampler.plan.seq_len)

    through = SamplePlan(TrainingPlan.from_config(case.config))
    whole = [read(through, step) for step in range(through.plan.steps)]
    start = data.draw(st.integers(0, through.plan.steps))
    resumed = SamplePlan(TrainingPlan.from_config(case.config))
    assert [read(resumed, step) for step in range(start, resumed.plan.steps)] == whole[start:]


def test_recycle_goes_on_in_the_lane_s_next_sample() -> None:
    config = run_config(
        seq_len=16,
        batch_size=2,
        duration={"steps": 4},
        curriculum={"pacing": "discrete", "stages": [{"seq_len": 12, "duration": {"steps": 3}}], "multiple": 4},
        data={"tail": "recycle"},
    )
    batches = [SamplePlan(TrainingPlan.from_config(config)).slices(step) for step in range(4)]
    assert [batch.samples.tolist() for batch in batches] == [[0, 1], [0, 1], [2, 3], [4, 5]]
    assert [batch.offsets.tolist() for batch in batches] == [[0, 0], [12, 12], [8, 8], [4, 4]]
    assert [batch.next_samples.tolist() for batch in batches] == [[-1, -1], [2, 3], [4, 5], [6, 7]]


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused() -> None:
    plan = TrainingPlan.from_config(run_config(seq_len=8, batch_size=6, duration={"steps": 1}))
    with pytest.raises(UserError, match=r"6 sequences .* 4 data-parallel ranks.*training\.batch_size"):
        rank_block(SamplePlan(plan).slices(0), 0, 4)


def test_every_batch_of_a_plan_is_checked() -> None:
    warmup = {"start": 4, "increment": 2, "duration": {"tokens": 400}}
    plan = TrainingPlan.from_config(
        run_config(seq_len=8, batch_size=8, training={"batch_size_warmup": warmup}, duration={"steps": 100})
    )
    assert plan.batch_sizes == [4, 6, 8]
    check_batches_divide(plan, 2)
    with pytest.raises(UserError, match=r"a batch of 6 sequences .* 4 data-parallel ranks"):
        check_batches_divide(plan, 4)


@property_test
@given(cases())
def test_batch_sizes_are_those_of_the_steps(case: Case) -> None:
    plan = TrainingPlan.from_config(case.config)
    assert plan.batch_sizes == sorted({step.batch_size for step in plan})


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


def test_micro_batches_of_known_steps() -> None:
    assert micro_batch_sizes(8, 64, 512) == (8,)
    assert micro_batch_sizes(8, 128, 1000) == (4, 4)
    assert micro_batch_sizes(8, 128, 500) == (3, 3, 2)
    assert micro_batch_sizes(8, 512, 512) == (1,) * 8
