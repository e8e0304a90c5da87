"""Records to lines of JSON and back; position buckets and the prefix."""

import json
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.errors import UserError
from megatron_ext.metrics.records import (
    EvalRecord,
    EventRecord,
    TrainRecord,
    bucket_edges,
    bucket_means,
    decode,
    encode,
    prefix_length,
)
from tests.engine.training import small_config

TRAIN: dict[str, Any] = {
    "step": 3,
    "tokens": 192,
    "samples": 24,
    "seq_len": 8,
    "batch_size": 8,
    "micro_batch_size": 4,
    "micro_batches": 2,
    "lr": 1e-4,
    "loss": 5.5,
    "loss_ratio": 0.97,
    "grad_norm": 1.25,
    "step_time_s": 0.5,
    "tokens_per_s": 128.0,
}


def train_record(**changes: Any) -> TrainRecord:
    return TrainRecord(**TRAIN | changes)


def same(left: object, right: object) -> bool:
    """Equality in which nan equals nan."""
    return repr(left) == repr(right)


numbers = st.floats(allow_nan=True, allow_infinity=True)
train_records = st.builds(
    train_record,
    step=st.integers(1, 10**9),
    tokens=st.integers(1, 10**13),
    loss=numbers,
    loss_ratio=numbers,
    grad_norm=st.none() | numbers,
    mfu=st.none() | numbers,
    skipped=st.booleans(),
    adam_var_l1=st.none() | numbers,
    sample_ids=st.none() | st.lists(st.integers(0, 10**9), max_size=4).map(tuple),
)


eval_records = st.builds(
    lambda losses, loss: EvalRecord(
        step=1, tokens=8, loss=loss, perplexity=1.0, position_edges=(0, 8), position_loss=tuple(losses)
    ),
    st.lists(numbers, max_size=4),
    numbers,
)


@given(train_records | eval_records)
def test_every_value_survives_strict_json(record: TrainRecord | EvalRecord) -> None:
    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    line = encode(record)
    assert "\n" not in line
    assert same(decode(json.loads(line, parse_constant=refuse)), record)


def test_the_fields_of_a_train_line() -> None:
    line = json.loads(encode(train_record()))
    assert line == TRAIN | {"kind": "train", "mfu": None, "skipped": False}
    detail = {"layers": {"0": (1.5, 0.5)}, "kinds": {"mlp": (1.5, 0.5), "norm": (0.5, 0.25)}}
    line = json.loads(encode(train_record(adam_var=detail)))
    assert line["adam_var"] == {"layers": {"0": [1.5, 0.5]}, "kinds": {"mlp": [1.5, 0.5], "norm": [0.5, 0.25]}}
    measured = json.loads(encode(train_record(adam_var_l1=2.0, adam_var_max=0.5, sample_ids=(4, 7), offsets=(0, 8))))
    assert (measured["adam_var_l1"], measured["adam_var_max"]) == (2.0, 0.5)
    assert (measured["sample_ids"], measured["offsets"]) == ([4, 7], [0, 8])


def test_non_finite_values_are_null_and_named() -> None:
    line = json.loads(encode(train_record(loss=math.nan, loss_ratio=math.inf)))
    assert line["loss"] is None
    assert line["loss_ratio"] is None
    assert line["non_finite"] == {"loss": "nan", "loss_ratio": "inf"}
    assert "non_finite" not in json.loads(encode(train_record(mfu=None)))
    losses = np.array([4.0] * 8 + [math.nan] + [2.0] * 7)
    line = json.loads(encode(EvalRecord.from_positions(losses, step=2, tokens=64, buckets=True)))
    assert line["position_loss"] == [4.0, None]
    assert line["non_finite"] == {"loss": "nan", "perplexity": "nan", "position_loss[1]": "nan"}
    detail = {"layers": {"0": [1.5, math.inf], "11": [math.nan, math.nan]}, "kinds": {"mlp": [1.0, 0.5]}}
    record = train_record(adam_var=detail)
    line = json.loads(encode(record))
    assert line["adam_var"]["layers"] == {"0": [1.5, None], "11": [None, None]}
    assert line["non_finite"] == {
        "adam_var[layers][0][1]": "inf",
        "adam_var[layers][11][0]": "nan",
        "adam_var[layers][11][1]": "nan",
    }
    assert same(decode(line), record)
    assert detail["layers"]["0"] == [1.5, math.inf], "the record itself is left alone"


def test_the_fields_of_an_eval_line() -> None:
    losses = np.array([4.0] * 8 + [2.0] * 4)
    line = json.loads(encode(EvalRecord.from_positions(losses, step=2, tokens=64, buckets=True)))
    assert line.pop("perplexity") == pytest.approx(math.exp(40 / 12))
    assert line.pop("loss") == pytest.approx(40 / 12)
    buckets = {"position_edges": [0, 8, 12], "position_loss": [4.0, 2.0]}
    assert line == {"kind": "eval", "step": 2, "tokens": 64, **buckets}
    assert "position_loss" not in encode(EvalRecord.from_positions(losses, step=2, tokens=64, buckets=False))


def test_perplexity_of_a_loss() -> None:
    assert EvalRecord.from_loss(step=1, tokens=8, loss=2.0).perplexity == pytest.approx(math.e**2)
    assert EvalRecord.from_loss(step=1, tokens=8, loss=1e6).perplexity == math.inf
    assert math.isnan(EvalRecord.from_loss(step=1, tokens=8, loss=math.nan).perplexity)


def test_event_keeps_its_details() -> None:
    event = EventRecord("resume", {"step": 5, "path": "checkpoints/step_5", "lag": math.inf})
    line = encode(event)
    assert json.loads(line)["name"] == "resume"
    assert decode(json.loads(line)) == event
    with pytest.raises(ValueError, match="kind"):
        encode(EventRecord("resume", {"kind": "train"}))


def test_what_a_later_version_wrote_is_read() -> None:
    line = json.loads(encode(train_record()))
    assert decode({**line, "new_field": 1}) == train_record()
    assert decode({"kind": "profile", "step": 1}) is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"step": 1}, '"kind" is None'),
        ({"kind": "eval", "step": 1, "tokens": 8}, "lacks loss, perplexity"),
        ({"kind": "event", "name": 3}, '"name" of an event is 3'),
    ],
)
def test_what_is_no_record_is_refused(line: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode(line)


@pytest.mark.parametrize(
    ("seq_len", "edges"),
    [
        (1, (0, 1)),
        (8, (0, 8)),
        (9, (0, 8, 9)),
        (32, (0, 8, 16, 32)),
        (1000, (0, 8, 16, 32, 64, 128, 256, 512, 1000)),
        (1024, (0, 8, 16, 32, 64, 128, 256, 512, 1024)),
    ],
)
def test_edges_double_up_to_the_length(seq_len: int, edges: tuple[int, ...]) -> None:
    assert bucket_edges(seq_len) == edges


@given(st.lists(st.floats(0, 20), min_size=1, max_size=200))
def test_bucket_means_are_means_and_average_to_the_loss(losses: list[float]) -> None:
    edges = bucket_edges(len(losses))
    means = bucket_means(np.array(losses), edges)
    spans = list(pairwise(edges))
    assert means == pytest.approx([sum(losses[first:end]) / (end - first) for first, end in spans])
    weighted = sum(mean * (end - first) for mean, (first, end) in zip(means, spans, strict=True))
    assert weighted / len(losses) == pytest.approx(np.mean(losses))


def test_the_prefix_is_the_first_length_unless_it_is_given_and_never_longer_than_the_full_one() -> None:
    assert [prefix_length(prefix, 8) for prefix in (None, 0, 24)] == [8, 0, 24]
    with pytest.raises(ValueError, match=r"metrics\.prefix is 33, more than training\.seq_len 32: write at most 32"):
        small_config(metrics={"prefix": 33})
