"""The learning rate against its formulas, written out once more per step."""

import math

import pytest

from tests.curriculum.runs import run_config

PEAK, LOW = 3e-4, 3e-5


def rates(learning_rate: dict[str, object], duration: dict[str, int]) -> list[tuple[int, float]]:
    config = run_config(
        seq_len=16,
        batch_size=2,
        duration=duration,
        curriculum={"pacing": "linear", "start": 8, "duration": {"steps": 6}},
        learning_rate={"peak": PEAK, "min": LOW, **learning_rate},
    )
    return [(step.consumed_tokens + step.tokens, step.lr) for step in config.plan()]


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_warmup_in_steps_then_decay_over_the_tokens_that_are_left(decay: str) -> None:
    steps = rates({"warmup": {"steps": 4}, "decay": decay}, {"steps": 20})
    warmup_end, end = steps[3][0], steps[-1][0]
    assert warmup_end == 4 * 16
    for number, (consumed, lr) in enumerate(steps):
        share = (consumed - warmup_end) / (end - warmup_end)
        shape = {
            "cosine": LOW + (PEAK - LOW) * 0.5 * (1 + math.cos(math.pi * share)),
            "linear": PEAK + (LOW - PEAK) * share,
            "constant": PEAK,
        }
        assert lr == pytest.approx(PEAK * (number + 1) / 4 if number < 4 else shape[decay], rel=1e-12)
    assert steps[3][1] == PEAK
    assert steps[-1][1] == (PEAK if decay == "constant" else LOW)


def test_warmup_in_tokens_reaches_the_peak_with_the_step_that_reaches_them() -> None:
    steps = rates({"warmup": {"tokens": 50}, "decay": "linear"}, {"tokens": 500})
    assert [lr for _, lr in steps[:3]] == pytest.approx([PEAK * 16 / 50, PEAK * 32 / 50, PEAK * 48 / 50])
    assert steps[3] == (64, PEAK)
    assert steps[4][1] == pytest.approx(PEAK - (PEAK - LOW) * 16 / (500 - 64))
    assert steps[-1] == (512, LOW)


def test_without_a_warmup_the_first_step_is_already_on_the_decay() -> None:
    steps = rates({"decay": "linear"}, {"steps": 20})
    assert steps[0][1] == pytest.approx(PEAK - (PEAK - LOW) * 16 / steps[-1][0])


def test_wsd_holds_the_peak_and_falls_over_the_cooldown() -> None:
    steps = rates({"warmup": {"steps": 2}, "decay": "wsd", "cooldown": {"tokens": 100}}, {"tokens": 500})
    for consumed, lr in steps[1:]:
        fallen = min(max((consumed - 400) / 100, 0), 1)
        assert lr == pytest.approx(PEAK - (PEAK - LOW) * fallen, rel=1e-12)
    assert {lr for consumed, lr in steps[1:] if consumed <= 400} == {PEAK}


def test_after_the_decay_the_minimum_is_kept() -> None:
    steps = rates({"warmup": {"steps": 2}, "decay_duration": {"steps": 10}}, {"steps": 20})
    assert {lr for _, lr in steps[9:]} == {LOW}
    assert steps[8][1] > LOW
