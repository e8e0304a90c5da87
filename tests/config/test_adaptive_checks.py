"""Contradictions that adaptive pacing can have: each is one message with key, value and what to write."""

from typing import Any

import pytest

from tests.config.builders import small_config
from tests.config.test_checks import problems


def adaptive(**changes: Any) -> dict[str, Any]:
    """Bounds of 20 and 50 steps in a run of 100; the learning rate does not decay."""
    curriculum = {"pacing": "adaptive", "start": 8, "fastest": {"steps": 20}, "slowest": {"steps": 50}}
    return {"curriculum": curriculum | changes, "learning_rate": {"peak": 1e-3, "decay": "constant"}}


def decaying(**rate: Any) -> dict[str, Any]:
    """The same with a budget of 100,000 tokens and a decay."""
    training = {"duration": {"tokens": 100_000}}
    return adaptive() | {"learning_rate": {"peak": 1e-3} | rate, "training": training}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
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
    ],
)
def test_a_contradiction_names_keys_values_and_what_to_write(sections: dict[str, Any], words: list[str]) -> None:
    [message] = problems(**sections)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "sections",
    [
        adaptive(),
        adaptive(fastest={"steps": 50}),
        adaptive(slowest={"steps": 99}, smoothing=20, hold_above=1.3, variance_above=1.1),
        adaptive(fastest={"tokens": 10}, slowest={"tokens": 10**9}),
        adaptive() | {"learning_rate": {"peak": 1e-3, "decay_duration": {"tokens": 50_000}}},
        decaying(),
        decaying(warmup={"tokens": 98_976}),
        decaying(decay="wsd", cooldown={"tokens": 9}, warmup={"steps": 9}),
    ],
)
def test_the_neighbors_of_a_contradiction_are_accepted(sections: dict[str, Any]) -> None:
    assert problems(**sections) == []


def test_when_the_variance_is_measured_belongs_to_the_run_where_it_decides() -> None:
    def digest(every: int, **curriculum: Any) -> str:
        return small_config(**adaptive(**curriculum), metrics={"adam_variance_every": every}).digest()

    assert digest(5) == digest(10)
    assert digest(5, variance_above=4) != digest(10, variance_above=4)
