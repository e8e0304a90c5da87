"""The analyze command."""

import contextlib
import io
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.analyze import command
from megatron_ext.curriculum.guards import LossRatio
from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.reading import read_metrics
from megatron_ext.metrics.records import EvalRecord, EventRecord
from megatron_ext.worker import main
from tests.metrics.test_records import train_record
from tests.ranks import run_ranks
from tests.train.small_run import write_config, write_corpus


def make_run(run: Path, *, variance: bool = True, losses: list[float] | None = None) -> Path:
    """60 steps, a spike at 31 and 32, back at 35; the variance follows the loss every fourth step."""
    if losses is None:
        losses = [2.0] * 60
        losses[30:34] = [5.0, 3.0, 2.3, 2.1]
    sink, ratio = JsonlSink(run / "metrics.jsonl"), LossRatio()
    for step, loss in enumerate(losses, start=1):
        measured = {"adam_var_l1": 10 * loss, "adam_var_max": loss / 10} if variance and step % 4 == 3 else {}
        sink.train(train_record(step=step, tokens=64 * step, loss=loss, loss_ratio=ratio.update(loss), **measured))
    sink.evaluation(EvalRecord.from_loss(step=60, tokens=64 * 60, loss=2.0))
    sink.event(EventRecord("checkpoint", {"step": 60}))
    sink.close()
    return run


def analyzed(run: Path, capsys: pytest.CaptureFixture[str], **options: Any) -> dict[str, Any]:
    command(run, as_json=True, **options)
    found: dict[str, Any] = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    return found


def test_json_holds_every_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = analyzed(make_run(tmp_path / "run"), capsys)
    assert found["steps"] == 60
    assert {row["threshold"]: row["count"] for row in found["ratio"]["rows"]} == {1.1: 3, 1.2: 2, 1.5: 1, 2: 1}
    assert found["ratio"]["largest"] == 2.5
    assert found["ratio"]["at"] == {"step": 31, "tokens": 31 * 64}
    assert (found["window"], found["smoothed_ratio"]["largest"]) == (11, 1.0)
    l1, largest = found["variance"]
    assert (l1["measure"], l1["measured"]) == ("adam_var_l1", 15)
    assert l1["max"] == {"value": 50, "at": {"step": 31, "tokens": 1984}}
    assert largest["measure"] == "adam_var_max"
    raw, smoothed = found["correlations"][:2]
    assert (raw["n"], raw["r"], raw["undefined"]) == (15, pytest.approx(1.0), None)
    assert (smoothed["r"], smoothed["undefined"]) == (None, "the loss ratio has the same value on all 15 steps")
    (spike,) = found["spikes"]
    assert (spike["start"]["step"], spike["steps"], spike["level"], spike["recovery_steps"]) == (31, 2, 2.0, 4)
    assert spike["recovery_tokens"] == 4 * 64


def test_options_change_what_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    found = analyzed(run, capsys, threshold=[1.4, 1.04, 1.4], spike=1.04, window=3)
    assert [(row["threshold"], row["count"]) for row in found["ratio"]["rows"]] == [(1.04, 4), (1.4, 2)]
    assert found["smoothed_ratio"]["largest"] == 1.5
    assert (found["spike_threshold"], found["spikes"][0]["steps"]) == (1.04, 4)
    found = analyzed(run, capsys, from_step=32)
    assert (found["steps"], found["first"]["step"], found["missing_steps"]) == (29, 32, 0)
    assert found["ratio"]["largest"] == 1.5
    assert (found["variance"][0]["measured"], found["correlations"][0]["n"]) == (7, 7)


def test_the_terminal_shows_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    command(run)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{run}: steps 1 to 60" in shown
    assert "largest 2.5 at step 31 (1,984 tokens)" in shown
    assert "1.2 2 3.333% 31" in shown
    assert "adam_var_l1 max 50 31" in shown
    assert "adam_var_l1 loss 15 1.0000" in shown
    assert "1 spike (loss ratio above 1.2), 0 not recovered" in shown
    assert "31 1,984 2 2.5 31 4 256" in shown


def test_a_run_without_variance_and_spikes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", variance=False, losses=[3.0, 2.0, 2.0, 2.0])
    command(run)
    shown = capsys.readouterr().out
    assert "variance was not measured" in shown
    assert "No spikes" in shown
    found = analyzed(run, capsys)
    assert found["variance"] == []
    assert {row["undefined"] for row in found["correlations"]} == {"it was never measured"}


def test_losses_that_are_not_finite(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", losses=[2.0] * 20 + [math.nan] * 5 + [4.0] * 15)
    found = analyzed(run, capsys)
    assert (found["non_finite_losses"], found["ratio"]["largest"]) == (5, "inf")
    (spike,) = found["spikes"]
    assert (spike["peak_ratio"], spike["recovered"]) == ("inf", None)
    command(run)
    shown = capsys.readouterr().out
    assert "not finite on 5 steps" in shown
    assert "not recovered" in shown


def test_a_file_without_its_beginning_keeps_the_recorded_ratio(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path / "run") / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[30:]))
    found = analyzed(path, capsys)
    assert found["ratio"]["largest"] == 2.5
    assert found["spikes"][0]["level"] is None
    command(path)
    assert "no loss before it" in " ".join(capsys.readouterr().out.split())


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl there"):
        command(tmp_path)
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match="no train record yet"):
        command(tmp_path)
    run = make_run(tmp_path / "run")
    for options, message in (
        ({"threshold": [1.1, math.nan]}, "--threshold is nan: write a loss ratio above 0"),
        ({"spike": 0.0}, "--spike is 0: write a loss ratio above 0"),
        ({"window": 4}, "--window is 4: write an odd number from 1 to 1001"),
        ({"from_step": 61}, "--from-step is 61, and the last step in .* is 60: write at most 60"),
        ({"window": 1003}, "--window is 1003"),
        ({"lengths": "8"}, "--lengths is given without --by-length"),
        ({"tokens": 8}, "--tokens is given without --by-length"),
        ({"lengths": "8,x", "by_length": True}, "--lengths is '8,x': write whole numbers"),
    ):
        chosen: dict[str, Any] = options
        with pytest.raises(UserError, match=message):
            command(run, **chosen)


def train_rank(_rank: int, _world_size: int, config: str) -> int:
    return main([config])


def by_length_rank(_rank: int, _world_size: int, run: str, calls: list[dict[str, Any]]) -> list[str]:
    """What the command prints for each of some options."""
    shown = []
    for options in calls:
        out = io.StringIO()
        os.environ.pop("RANK", None)  # as started by a user: each call is a job of one, on a port of its own
        with contextlib.redirect_stdout(out):
            try:
                command(Path(run), by_length=True, **options)
            except UserError as error:
                out.write(f"error: {error}")
        shown.append(out.getvalue())
    return shown


def test_gradients_by_length_from_a_checkpoint(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 2}}
    sections = {"learning_rate": {"peak": 1e-3}, "checkpoint": {}, "validation": {"samples": 2}}
    config = write_config(tmp_path, training=training, curriculum={"pacing": "constant"}, **sections)
    assert run_ranks(train_rank, 1, str(config), init=False) == [0]
    recorded = read_metrics(tmp_path / "small")
    assert [record.prefix_loss for record in recorded.train] == [record.loss for record in recorded.train]
    assert recorded.evaluations[-1].position_edges == (0, 8, 16, 32)
    calls = [
        {"batches": 4, "as_json": True},
        {"batches": 2, "lengths": "32,8", "tokens": 64, "seed": 7},
        {"lengths": "8,24", "tokens": 64},
    ]
    (shown,) = run_ranks(by_length_rank, 1, str(tmp_path / "small"), calls, init=False)
    found = json.loads(shown[0])
    assert [row["seq_len"] for row in found["lengths"]] == [8, 16, 32]
    for row in found["lengths"]:
        assert (row["tokens"], row["sequences"], row["batches"]) == (128, 128 // row["seq_len"], 4)
        assert 0 < row["std_max"] < row["std_l1"]
        assert 4 < row["loss"] < math.log(300) * 1.1
        assert len(row["outliers"]) == 3
    assert "2 batches of 64 tokens at each length" in shown[1]
    assert shown[2].startswith("error: --tokens is 64, which length 24 does not divide")
