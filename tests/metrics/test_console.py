"""What the log and the terminal show; recent speed and time left."""

import io
import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from megatron_ext.metrics.console import LogLines, TokenRate
from megatron_ext.metrics.progress_bar import ProgressBar
from megatron_ext.metrics.records import EvalRecord, EventRecord
from tests.metrics.test_records import train_record

LOGGER = logging.getLogger("tests.console")


def test_log_lines_come_every_so_many_steps_and_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines(LOGGER, log_every=4, total_tokens=640)
    with caplog.at_level(logging.INFO):
        for step in range(1, 11):
            lines.train(train_record(step=step, tokens=step * 64))
    lines.close()
    assert [message.split(" |")[0] for message in caplog.messages] == ["step 4", "step 8", "step 10"]
    assert caplog.messages[0] == (
        "step 4 | tokens 256/640 (40.0%) | length 8 | loss 5.5000 | lr 1.000e-04 | grad norm 1.250 | "
        "128 tokens/s | ETA 3.0 s"
    )


def test_log_lines_of_odd_values(caplog: pytest.LogCaptureFixture) -> None:
    lines = LogLines(LOGGER, log_every=1, total_tokens=640)
    with caplog.at_level(logging.INFO):
        lines.train(train_record(loss=math.nan, grad_norm=None, skipped=True, step_time_s=0.0))
        lines.evaluation(EvalRecord.from_loss(step=1500, tokens=12_000, loss=2.0))
        lines.event(EventRecord("resume", {"step": 100, "tokens": 800}))
        lines.event(EventRecord("preemption"))
    assert "loss nan" in caplog.messages[0]
    assert "grad norm ?" in caplog.messages[0]
    assert caplog.messages[0].endswith("ETA ? | update skipped")
    assert caplog.messages[1:] == [
        "validation after step 1,500 (12K tokens): loss 2.0000, perplexity 7.39",
        "resume: step 100, tokens 800",
        "preemption",
    ]


def test_progress_bar_fits_a_narrow_terminal() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    bar = ProgressBar(console, total_tokens=6_400_000, tokens=0)
    bar.train(train_record(step=1, tokens=3_210_000, loss=4.1234, seq_len=1024, batch_size=512, step_time_s=9.5))
    bar.evaluation(EvalRecord.from_loss(step=1, tokens=3_210_000, loss=2.0))
    bar.event(EventRecord("checkpoint", {"step": 1, "path": "[bold]"}))
    bar.close()
    text = out.getvalue()
    assert "50% 3.21M/6.4M tok · len 1024 · loss 4.123 · 55.19K tok/s · ETA 57.8 s" in text
    assert "validation after step 1 (3.21M tokens): loss 2.0000, perplexity 7.39\n" in text
    assert "checkpoint: step 1, path [bold]\n" in text


def rate_of(steps: list[tuple[float, float]]) -> TokenRate:
    rate = TokenRate()
    for tokens, seconds in steps:
        rate.add(tokens=tokens, seconds=seconds)
    return rate


@given(st.lists(st.tuples(st.integers(1, 10**6), st.floats(1e-3, 100.0)), min_size=1, max_size=50))
def test_rate_lies_between_the_slowest_and_the_fastest_step(steps: list[tuple[float, float]]) -> None:
    rate = rate_of(steps).tokens_per_s
    assert rate is not None
    speeds = [tokens / seconds for tokens, seconds in steps]
    assert min(speeds) * (1 - 1e-9) <= rate <= max(speeds) * (1 + 1e-9)


@given(speed=st.floats(1.0, 1e6), lengths=st.lists(st.integers(1, 64), min_size=1, max_size=200))
def test_growing_steps_at_one_speed_have_that_speed(speed: float, lengths: list[int]) -> None:
    rate = rate_of([(length * 8, length * 8 / speed) for length in sorted(lengths)])
    assert rate.tokens_per_s == pytest.approx(speed)
    assert rate.seconds_left(1000) == pytest.approx(1000 / speed)


def test_old_speed_is_forgotten_and_one_slow_step_does_not_become_the_rate() -> None:
    slow_then_fast = rate_of([(100.0, 1.0)] * 100 + [(1000.0, 1.0)] * 300)
    assert slow_then_fast.tokens_per_s == pytest.approx(1000.0, rel=1e-2)
    rate = rate_of([(1000.0, 10.0)] * 20 + [(1000.0, 60.0)]).tokens_per_s
    assert rate is not None
    assert 50 < rate < 100


def test_nothing_is_known_before_the_first_step() -> None:
    assert TokenRate().tokens_per_s is None
    assert TokenRate().seconds_left(10) is None
    assert rate_of([(10.0, 1.0)]).seconds_left(-5) == 0.0
