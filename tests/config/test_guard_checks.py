"""Guards against the checkpoints that they need."""

from typing import Any

import pytest

from tests.config.test_checks import problems


@pytest.mark.parametrize(
    ("guards", "checkpoint", "words"),
    [
        ({"non_finite": "rollback"}, {}, ["guards.non_finite", "checkpoint.every null"]),
        (
            {"loss_ratio": {"above": 2.0, "action": "rollback"}},
            {},
            ["guards.loss_ratio.action", "checkpoint.every null"],
        ),
        (
            {"loss_ratio": {"above": 2.0, "steps": 5, "action": "rollback"}},
            {"every": {"steps": 2}, "keep_last": 2},
            ["checkpoint.keep_last is 2", "write checkpoint.keep_last 3"],
        ),
        (
            {"loss_ratio": {"above": 2.0, "steps": 2, "action": "rollback"}},
            {"every": {"tokens": 100}, "keep_last": 1},
            ["checkpoint.keep_last is 1", "write checkpoint.keep_last 2"],
        ),
    ],
)
def test_a_rollback_needs_checkpoints(guards: dict[str, Any], checkpoint: dict[str, Any], words: list[str]) -> None:
    (problem,) = problems(guards=guards, checkpoint=checkpoint)
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    ("guards", "checkpoint"),
    [
        ({"non_finite": "stop", "loss_ratio": {"above": 2.0, "steps": 9, "action": "skip"}}, {"keep_last": 1}),
        ({"non_finite": "rollback"}, {"every": {"steps": 1}, "keep_last": 1}),
        ({"loss_ratio": {"above": 2.0, "steps": 5, "action": "rollback"}}, {"every": {"steps": 2}, "keep_last": 3}),
    ],
)
def test_what_works_is_accepted(guards: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    assert problems(guards=guards, checkpoint=checkpoint) == []
