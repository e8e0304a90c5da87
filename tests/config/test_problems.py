"""Contradictions, within a section and between them: one message each, with key, value, what to write."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from megatron_ext.curriculum.pacing import nearest_multiples
from tests.config.builders import small_config


def problems(**sections: Any) -> list[str]:
    try:
        small_config(**sections)
    except ValidationError as error:
        [detail] = error.errors()
        assert detail["loc"] == ()
        return str(detail["ctx"]["error"]).splitlines()
    return []


def linear(**changes: Any) -> dict[str, Any]:
    return {"curriculum": {"pacing": "linear", "start": 8, "duration": {"steps": 50}, **changes}}


def discrete(*stages: tuple[int, int], **changes: Any) -> dict[str, Any]:
    listed = [{"seq_len": length, "duration": {"steps": steps}} for length, steps in stages]
    return {"curriculum": {"pacing": "discrete", "stages": listed, **changes}}


def mixed(*lengths: int) -> dict[str, Any]:
    return {"curriculum": {"pacing": "mixed", "lengths": list(lengths)}}


def rate(**changes: Any) -> dict[str, Any]:
    return {"learning_rate": {"peak": 1e-3, **changes}}


def warmup(**changes: Any) -> dict[str, Any]:
    return {"training": {"batch_size_warmup": {"start": 2, "increment": 2, "duration": {"steps": 50}, **changes}}}


def adaptive(**changes: Any) -> dict[str, Any]:
    """Bounds of 20 and 50 steps in a run of 100; the learning rate does not decay."""
    curriculum = {"pacing": "adaptive", "start": 8, "fastest": {"steps": 20}, "slowest": {"steps": 50}}
    return {"curriculum": curriculum | changes, "learning_rate": {"peak": 1e-3, "decay": "constant"}}


def decaying(**rate: Any) -> dict[str, Any]:
    """The same with a budget of 100,000 tokens and a decay."""
    training = {"duration": {"tokens": 100_000}}
    return adaptive() | {"learning_rate": {"peak": 1e-3} | rate, "training": training}


def guards(checkpoint: dict[str, Any] | None = None, **values: Any) -> dict[str, Any]:
    return {"guards": values, "checkpoint": checkpoint or {}}


def rollback(steps: int = 1) -> dict[str, Any]:
    return {"above": 2.0, "steps": steps, "action": "rollback"}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"hidden_size": 66}}, ["model.hidden_size is 66", "num_attention_heads 4", "write", "64 or 68"]),
        ({"model": {"hidden_size": 2}}, ["model.hidden_size is 2", "write model.hidden_size 4"]),
        (
            {"parallel": {"tensor": 3}, "model": {"ffn_hidden_size": 9, "vocab_multiple": 3}},
            ["tensor is 3", "1, 2 or 4"],
        ),
        ({"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 99}}, ["model.ffn_hidden_size = 99", "write", "100"]),
        (
            {"parallel": {"tensor": 2}, "model": {"vocab_size": 1001, "vocab_multiple": 7}},
            ["the 1001 rows", "vocab_size 1001", "write model.vocab_multiple 14"],
        ),
        (
            {"model": {"max_position_embeddings": 100}},
            ["training.seq_len is 128", "max_position_embeddings 100", "at most 100"],
        ),
        ({"parallel": {"micro_batch_tokens": 127}}, ["micro_batch_tokens is 127", "seq_len 128", "at least 128"]),
        (
            {"parallel": {"offload_optimizer": "cpu", "zero_stage": 0}},
            ["offload_optimizer", "zero_stage 0", "1, 2 or 3"],
        ),
        ({"parallel": {"offload_params": "cpu", "zero_stage": 2}}, ["offload_params", "zero_stage 2", "zero_stage 3"]),
        (
            {"parallel": {"offload_optimizer": "cpu"}, "optimizer": {"implementation": "torch"}},
            ['implementation is "torch"', "offload_optimizer", '"auto" or "deepspeed_cpu"'],
        ),
        ({"data": {"sources": None}}, ["data names no token files", "data.sources", "data.train and data.valid"]),
        ({"data": {"valid": [{"prefix": "v"}]}}, ["data.sources and data.valid are both given"]),
        ({"data": {"sources": None, "train": [{"prefix": "t"}]}}, ["data.train is given without data.valid"]),
        ({"data": {"sources": None, "valid": [{"prefix": "t"}]}}, ["data.valid is given without data.train"]),
        ({"data": {"split": [0, 1, 0]}}, ["data.split is [0.0, 1.0, 0.0]", "nothing for training", "[949, 50, 1]"]),
        ({"data": {"split": [1, 0, 0]}}, ["nothing for validation"]),
        ({"deepspeed": {"gradient_clipping": 0.5}}, ["deepspeed.gradient_clipping may not be set here"]),
        (linear(start=20), ["curriculum.start is 20", "curriculum.multiple 8", "write 16 or 24"]),
        (linear(start=3), ["curriculum.start is 3", "write 8"]),
        (linear(end=100), ["curriculum.end is 100", "curriculum.multiple 8", "write 96 or 104"]),
        (linear(end=136), ["curriculum.end is 136", "training.seq_len 128", "at most 128"]),
        (linear(start=64, end=32), ["curriculum.start is 64", "the end of the curriculum, 32"]),
        (linear(multiple=12, start=12), ["training.seq_len (where the curriculum ends) is 128", "write 120 or 132"]),
        (linear(duration={"steps": 100}), ["curriculum.duration is 100 steps", "training.duration, 100 steps"]),
        (discrete((20, 5)), ["curriculum.stages[0].seq_len is 20", "write 16 or 24"]),
        (discrete((32, 5), (16, 5)), ["curriculum.stages[1].seq_len is 16 after a stage of 32", "rise"]),
        (discrete((32, 5), (32, 5)), ["curriculum.stages[1].seq_len is 32 after a stage of 32"]),
        (discrete((32, 5), (128, 5)), ["curriculum.stages[1].seq_len is 128", "training.seq_len 128 follows"]),
        (discrete((32, 60), (64, 40)), ["the sum of curriculum.stages is 100 steps", "training.duration"]),
        (mixed(20, 128), ["curriculum.lengths[0] is 20", "write 16 or 24"]),
        (mixed(64, 32, 128), ["curriculum.lengths is [64, 32, 128]", "rising"]),
        (mixed(32, 64), ["curriculum.lengths ends with 64", "training.seq_len 128"]),
        (rate(min=0.01), ["learning_rate.min is 0.01", "learning_rate.peak 0.001", "at most 0.001"]),
        (rate(decay="wsd"), ['"wsd" without learning_rate.cooldown']),
        (rate(cooldown={"steps": 5}), ['cooldown is 5 steps with learning_rate.decay "cosine"', 'write decay "wsd"']),
        (rate(warmup={"steps": 100}), ["learning_rate.warmup is 100 steps", "training.duration, 100 steps"]),
        (rate(decay_duration={"steps": 101}), ["decay_duration is 101 steps", "at most 100 steps"]),
        (
            rate(decay="wsd", warmup={"steps": 60}, cooldown={"steps": 41}),
            ["learning_rate.warmup + learning_rate.cooldown is 101 steps", "training.duration, 100 steps"],
        ),
        (
            rate(warmup={"steps": 60}, decay_duration={"steps": 50}),
            ["learning_rate.warmup is 60 steps", "learning_rate.decay_duration, 50 steps"],
        ),
        (warmup(start=9), ["start is 9", "training.batch_size 8", "at most 8"]),
        (warmup(increment=4), ["increment is 4", "the 6 sequences", "write 3 or 6"]),
        (warmup(duration={"steps": 100}), ["batch_size_warmup.duration is 100 steps"]),
        ({**warmup(), **linear()}, ["training.batch_size_warmup", 'curriculum.pacing "linear"', "null"]),
        (
            {"training": {"duration": {"steps": 2**50}}},
            ["training.duration is", "training.batch_size 8", "training.seq_len 128", "9,007,199,254,740,992"],
        ),
        ({**warmup(), "data": {"tail": "recycle"}}, ['data.tail "recycle"', 'write data.tail "truncate"']),
        (adaptive(start=9), ["curriculum.start is 9", "write 8 or 16"]),
        (adaptive(end=256), ["curriculum.end is 256", "at most 128"]),
        (adaptive(slowest={"steps": 100}), ["curriculum.slowest is 100 steps", "training.duration, 100 steps"]),
        (adaptive(fastest={"steps": 60}), ["curriculum.fastest is 60 steps", "slowest, 50 steps", "exchange"]),
        (adaptive(fastest={"tokens": 60}), ["curriculum.fastest is 60 tokens", "both in steps or both in tokens"]),
        (adaptive(hold_above=1.5), ["curriculum.back_above is 1.3", "hold_above 1.5", "at least 1.5"]),
        (adaptive(smoothing=30), ["curriculum.smoothing is 30", "curriculum.interval 20", "at most 20"]),
        (adaptive(variance_above=0.9), ["curriculum.variance_above is 0.9", "more than 1", "0 to turn it off"]),
        (
            adaptive(variance_above=3) | {"metrics": {"adam_variance_every": 0}},
            ["curriculum.variance_above is 3", "metrics.adam_variance_every 0"],
        ),
        (
            adaptive() | {"learning_rate": {"peak": 1e-3}},
            ["training.duration is 100 steps", "decay_duration", "tokens"],
        ),
        (decaying(decay_duration={"steps": 9}), ["learning_rate.decay_duration is 9 steps", '"adaptive"']),
        (decaying(decay="wsd", cooldown={"steps": 9}), ["learning_rate.cooldown is 9 steps", '{"tokens": n}']),
        (decaying(warmup={"tokens": 99_500}), ["learning_rate.warmup is 99,500 tokens", "1,024 tokens", "100,000"]),
        (
            decaying(warmup={"tokens": 89_500}, decay="wsd", cooldown={"tokens": 10_000}),
            ["learning_rate.warmup is 89,500 tokens", "no decay before 90,000"],
        ),
        (
            adaptive() | {"training": {"batch_size_warmup": {"start": 2, "increment": 2, "duration": {"steps": 9}}}},
            ["training.batch_size_warmup", 'curriculum.pacing "adaptive"'],
        ),
        (guards(non_finite="rollback"), ["guards.non_finite", "checkpoint.every null"]),
        (guards(loss_ratio=rollback()), ["guards.loss_ratio.action", "checkpoint.every null"]),
        (
            guards({"every": {"steps": 2}, "keep_last": 2}, loss_ratio=rollback(5)),
            ["checkpoint.keep_last is 2", "write checkpoint.keep_last 3"],
        ),
        (
            guards({"every": {"tokens": 100}, "keep_last": 1}, loss_ratio=rollback(2)),
            ["checkpoint.keep_last is 1", "write checkpoint.keep_last 2"],
        ),
    ],
)
def test_a_contradiction_names_keys_values_and_what_to_write(sections: dict[str, Any], words: list[str]) -> None:
    [message] = problems(**sections)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "sections",
    [
        {"parallel": {"tensor": 4, "micro_batch_tokens": 128}},
        # What the messages above say to write.
        {"model": {"hidden_size": 68}},
        {"parallel": {"tensor": 2}, "model": {"ffn_hidden_size": 100}},
        {"parallel": {"tensor": 2}, "model": {"vocab_size": 1001, "vocab_multiple": 14}},
        {"model": {"max_position_embeddings": 256}},
        {"parallel": {"offload_optimizer": "cpu", "offload_params": "cpu", "zero_stage": 3}},
        {"parallel": {"offload_optimizer": "cpu"}, "optimizer": {"implementation": "deepspeed_cpu"}},
        {"data": {"sources": None, "train": [{"prefix": "t"}], "valid": [{"prefix": "v"}], "split": [0, 0, 1]}},
        {"data": {"split": [9, 1, 0]}},
        linear(),
        linear(start=128),
        linear(end=64),
        linear(duration={"steps": 99}),
        linear(duration={"tokens": 10**9}),
        {**linear(), "data": {"tail": "recycle"}},
        discrete((32, 50), (64, 49)),
        discrete((7, 5), multiple=7),
        rate(min=1e-3),
        rate(decay="wsd", warmup={"steps": 60}, cooldown={"steps": 40}),
        rate(decay_duration={"steps": 100}, warmup={"steps": 99}),
        rate(warmup={"tokens": 10**9}),
        warmup(),
        warmup(start=8),
        adaptive(),
        adaptive(fastest={"steps": 50}),
        adaptive(slowest={"steps": 99}, smoothing=20, hold_above=1.3, variance_above=1.1),
        adaptive(fastest={"tokens": 10}, slowest={"tokens": 10**9}),
        adaptive() | {"learning_rate": {"peak": 1e-3, "decay_duration": {"tokens": 50_000}}},
        decaying(),
        decaying(warmup={"tokens": 98_976}),
        decaying(decay="wsd", cooldown={"tokens": 9}, warmup={"steps": 9}),
        guards({"keep_last": 1}, non_finite="stop", loss_ratio={"above": 2.0, "steps": 9, "action": "skip"}),
        guards({"every": {"steps": 1}, "keep_last": 1}, non_finite="rollback"),
        guards({"every": {"steps": 2}, "keep_last": 3}, loss_ratio=rollback(5)),
    ],
)
def test_the_neighbors_of_a_contradiction_are_accepted(sections: dict[str, Any]) -> None:
    assert problems(**sections) == []


def test_all_contradictions_are_reported_together() -> None:
    found = problems(model={"hidden_size": 66}, data={"split": [0, 1, 0]}, learning_rate={"min": 1})
    assert len(found) == 3


@given(st.integers(1, 3000), st.integers(1, 200), st.integers(1, 4000))
def test_the_lengths_offered_are_valid_and_none_is_nearer(value: int, multiple: int, most: int) -> None:
    offered = nearest_multiples(value, multiple, most=most)
    valid = list(range(multiple, most + 1, multiple))
    assert set(offered) <= set(valid)
    assert bool(offered) == bool(valid)
    if valid:
        assert min(abs(value - length) for length in offered) == min(abs(value - length) for length in valid)


def test_when_the_variance_is_measured_belongs_to_the_run_where_it_decides() -> None:
    def digest(every: int, **curriculum: Any) -> str:
        return small_config(**adaptive(**curriculum), metrics={"adam_variance_every": every}).digest()

    assert digest(5) == digest(10)
    assert digest(5, variance_above=4) != digest(10, variance_above=4)
