"""Contradictions between model, layout and data."""

from typing import Any

import pytest
from pydantic import ValidationError

from tests.config.builders import small_config


def problems(**sections: Any) -> list[str]:
    try:
        small_config(**sections)
    except ValidationError as error:
        [detail] = error.errors()
        assert detail["loc"] == ()
        return str(detail["ctx"]["error"]).splitlines()
    return []


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
    ],
)
def test_the_neighbors_of_a_contradiction_are_accepted(sections: dict[str, Any]) -> None:
    assert problems(**sections) == []


def test_all_contradictions_are_reported_together() -> None:
    found = problems(model={"hidden_size": 66}, data={"split": [0, 1, 0]}, learning_rate={"min": 1})
    assert len(found) == 3
