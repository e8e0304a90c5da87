"""What the log and the terminal show."""

import io
import logging
import math

import pytest
from rich.console import Console

from megatron_ext.metrics.console import LogLines, ProgressBar
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
        "128 tokens/s | ETA 0:03"
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
    assert "50% 3.21M/6.4M tok · len 1024 · loss 4.123 · 55.19K tok/s · ETA 0:58" in text
    assert "validation after step 1 (3.21M tokens): loss 2.0000, perplexity 7.39\n" in text
    assert "checkpoint: step 1, path [bold]\n" in text
