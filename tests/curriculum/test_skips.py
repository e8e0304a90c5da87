"""Laws of skipped samples."""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.plan import TrainingPlan
from megatron_ext.curriculum.sampler import SamplePlan
from megatron_ext.curriculum.skips import SkippedSamples, positions_between

STRETCHES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=4)


def skipped_of(total: int, stretches: list[tuple[int, int]]) -> SkippedSamples:
    skipped = SkippedSamples(total)
    for first, count in stretches:
        skipped = skipped.without(range(first, first + count))
        assume(skipped.left > 0)
    return skipped


def ids(skipped: SkippedSamples) -> set[int]:
    return {sample for first, count in skipped.ranges for sample in range(first, first + count)}


@settings(deadline=None)
@given(total=st.integers(13, 50), stretches=STRETCHES)
def test_one_lap_reads_every_other_sample_once_and_in_order(total: int, stretches: list[tuple[int, int]]) -> None:
    skipped = skipped_of(total, stretches)
    kept = [sample for sample in range(total) if sample not in ids(skipped)]
    assert skipped.left == len(kept)
    assert skipped.samples(np.arange(2 * len(kept))).tolist() == kept * 2
    assert all(a + count < b for (a, count), (b, _) in zip(skipped.ranges, skipped.ranges[1:], strict=False))


@settings(deadline=None)
@given(total=st.integers(13, 50), stretches=STRETCHES, first=st.integers(0, 40), count=st.integers(1, 12))
def test_what_was_read_at_the_positions_is_skipped_and_nothing_before_them_moves(
    total: int, stretches: list[tuple[int, int]], first: int, count: int
) -> None:
    before = skipped_of(total, stretches)
    read = set(before.samples(np.arange(first, first + count)).tolist())
    after = before.without(range(first, first + count))
    assert ids(after) == ids(before) | read
    if after.left and first + count <= before.left:
        earlier = np.arange(min(first, after.left))
        assert after.samples(earlier).tolist() == before.samples(earlier).tolist()
    assert before.with_ranges(after.to_json()) == after


def plan_of(tail: str) -> TrainingPlan:
    return TrainingPlan.from_config(
        RunConfig.model_validate(
            {
                "model": {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "vocab_size": 16},
                "data": {"sources": ({"prefix": "unused"},), "tail": tail},
                "training": {"seq_len": 32, "batch_size": 4, "duration": {"steps": 40}},
                "curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 30}},
                "learning_rate": {"peak": 1e-3},
            }
        )
    )


@settings(deadline=None)
@given(tail=st.sampled_from(["truncate", "recycle"]), to=st.integers(1, 20), length=st.integers(0, 5))
def test_steps_after_a_rollback_read_nothing_that_the_steps_given_up_had_read(tail: str, to: int, length: int) -> None:
    plan = plan_of(tail)
    sampler, bad = SamplePlan(plan), to + length
    skipped = SkippedSamples.none(plan.samples, plan)
    after = skipped.without(positions_between(plan, to, bad))
    given_up = [sampler.slices(step) for step in range(to, bad + 1)]
    read = {sample for batch in given_up for sample in (*batch.samples, *batch.next_samples) if sample >= 0}
    for step in range(to, plan.steps):
        plain = sampler.slices(step)
        batch = after.applied(plain)
        assert not read & {*batch.samples.tolist(), *batch.next_samples.tolist()}
        assert batch.offsets.tolist() == plain.offsets.tolist()
        assert len(set(batch.samples.tolist())) == len(batch)
        if tail == "recycle":
            # Lanes keep to their own samples, and a sequence that runs over goes on in the lane's next one.
            assert (batch.samples % 4).tolist() == [0, 1, 2, 3]
            over = batch.next_samples >= 0
            assert (over == (plain.next_samples >= 0)).all()
            assert (batch.next_samples[over] % 4).tolist() == np.arange(4)[over].tolist()
