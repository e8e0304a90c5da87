"""The report command."""

import math
from pathlib import Path

import pytest

from megatron_ext.analysis.report import run_labels
from megatron_ext.cli.report import command
from megatron_ext.errors import UserError
from megatron_ext.metrics.jsonl import JsonlSink
from megatron_ext.metrics.records import EvalRecord, EventRecord
from tests.metrics.test_records import train_record

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(run_dir: Path, steps: int = 30) -> Path:
    sink = JsonlSink(run_dir / "metrics.jsonl")
    for step in range(1, steps + 1):
        sink.train(train_record(step=step, tokens=step * 64, loss=2 + 5 / step))
    sink.evaluation(EvalRecord.from_loss(step=steps, tokens=steps * 64, loss=2.5))
    sink.event(EventRecord("resume", {"step": 3}))
    sink.close()
    return run_dir


def test_one_run_gets_a_page_in_its_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run")
    command([run])
    page = run / "report.html"
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    command([run / "metrics.jsonl"])
    assert capsys.readouterr().out == f"{page}\n"


@pytest.mark.parametrize(("name", "begins"), [("compare.png", PNG), ("Compare.HTML", b"<!DOCTYPE html>")])
def test_several_runs_are_shown_where_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, begins: bytes
) -> None:
    runs = [make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run", steps=1)]
    output = tmp_path / "deep" / "er" / name
    command(runs, output=output)
    assert output.read_bytes().startswith(begins)
    assert capsys.readouterr().out == f"{output}\n"


def test_several_runs_go_to_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b")]
    monkeypatch.chdir(tmp_path)
    command(runs, target_loss=2.6)
    page = (tmp_path / "report.html").read_text()
    assert "2 runs compared" in page
    assert "2.6000, as asked for" in page


@pytest.mark.parametrize("suffix", ["html", "png"])
def test_bad_input_is_named(tmp_path: Path, suffix: str) -> None:
    empty, output = tmp_path / "empty", tmp_path / f"report.{suffix}"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty: no metrics\.jsonl there"):
        command([empty], output=output)
    JsonlSink(empty / "metrics.jsonl").close()
    with pytest.raises(UserError, match="no train record yet"):
        command([empty], output=output)
    run = make_run(tmp_path / "run")
    output.mkdir()
    wrong: list[tuple[Path, float | None, str]] = [
        (output, None, "cannot be written"),
        (tmp_path / "report.pdf", None, r"ends in \.html or \.png"),
        (tmp_path / "picture.png", 2.0, "the picture has no table"),
        *((tmp_path / "page.html", loss, r"--target-loss is .*above 0") for loss in (0.0, -1.0, math.nan, math.inf)),
    ]
    for path, loss, message in wrong:
        with pytest.raises(UserError, match=message):
            command([run], output=path, target_loss=loss)


def test_labels_tell_runs_apart(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("x/slw", "y/slw", "y/baseline")]
    for run in runs:
        run.mkdir(parents=True)
    assert run_labels([runs[0], runs[2]]) == ["slw", "baseline"]
    assert run_labels(runs) == ["x/slw", "y/slw", "y/baseline"]
    assert run_labels([runs[0], runs[0]]) == [str(runs[0])] * 2
    assert run_labels([runs[0] / "metrics.jsonl"]) == ["slw"]
