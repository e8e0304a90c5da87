"""The experiment command: states read off run directories, and real runs that fail, stop and go on."""

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import typer

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.experiments.config import Experiment, load_experiment
from megatron_ext.experiments.runs import statuses, train_all
from megatron_ext.launch import launcher
from megatron_ext.launch.launcher import Target
from megatron_ext.runtime.signals import StopRequest
from tests.cli.conftest import CommandLine, leave_traces
from tests.experiments.test_config import load
from tests.metrics.test_records import train_record
from tests.train.small_run import cli, records, started, wait_for_step, write_config, write_corpus

VARIANTS: dict[str, Any] = {
    "base": {},
    "root": {"curriculum": {"pacing": "root", "start": 8, "duration": {"steps": 9}}},
}


@pytest.fixture
def study(tmp_path: Path) -> Experiment:
    """Two variants with two seeds of 100 steps, nothing trained."""
    return load(tmp_path, output_dir=str(tmp_path / "out"), seeds=[1, 2], nproc=3, variants=VARIANTS)


def states(study: Experiment) -> dict[str, str]:
    return {status.name: status.state for status in statuses(study)}


@pytest.fixture
def fake_start(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces training by a function that leaves a finished run's traces; the names of the runs it was asked for.

    "base-seed2" fails, in two ways, and in the first "root-seed1" a signal arrives.
    """
    asked: list[str] = []
    stop_once = SimpleNamespace(done=False)

    def launch(target: Target, run: RunConfig, *, stop: StopRequest) -> int:
        assert target.ranks == 3
        asked.append(run.name)
        if run.name == "base-seed2":
            if not stop_once.done:
                raise UserError("no such corpus")
            return 7
        if run.name == "root-seed1" and not stop_once.done:
            stop_once.done = True
            leave_traces(run, step=40)
            stop.receive(signal.SIGTERM)
            return 0
        leave_traces(run, step=100)
        return 0

    monkeypatch.setattr(launcher, "launch", launch)
    return asked


def test_runs_go_on_after_a_failure_stop_on_a_signal_and_are_not_repeated(
    study: Experiment, command_line: CommandLine, fake_start: list[str]
) -> None:
    file = str(study.source)
    out, err = command_line("experiment", "run", file, code=1)
    assert fake_start == ["base-seed1", "base-seed2", "root-seed1"]
    assert "error: no such corpus" in err
    assert "base-seed2 failed: no such corpus" in err
    assert "stopped on SIGTERM" in out
    assert states(study) == {
        "base-seed1": "finished",
        "base-seed2": "failed",
        "root-seed1": "interrupted",
        "root-seed2": "waiting",
    }
    fake_start.clear()
    (study.runs[2].config.run_dir / "metrics.jsonl").unlink()
    out, err = command_line("experiment", "run", file, code=1)
    assert fake_start == ["base-seed2", "base-seed2", "root-seed1", "root-seed2"]
    assert "base-seed1: finished before, skipped" in out
    assert "base-seed2 failed (exit status 7" in err
    assert "once more from its newest checkpoint" in err
    assert "base-seed2 failed: exit status 7" in err
    assert "1 failed, 3 finished" in out
    for run in study.runs:
        written = Path(study.config.output_dir) / "configs" / f"{run.config.name}.json"
        assert RunConfig.model_validate_json(written.read_text()) == run.config


def test_a_run_is_finished_by_its_checkpoint_or_its_last_validation(study: Experiment, tmp_path: Path) -> None:
    leave_traces(study.runs[0].config, step=100)
    leave_traces(study.runs[1].config, step=100, checkpoint=False)
    leave_traces(study.runs[2].config, step=99)
    assert list(states(study).values()) == ["finished", "finished", "interrupted", "waiting"]
    short = {"short": {"training": {"stop_after": {"steps": 30}}}}
    stopping = load(tmp_path, output_dir=str(tmp_path / "stopping"), variants=short)
    leave_traces(stopping.runs[0].config, step=30)
    assert list(states(stopping).values()) == ["finished"]


def test_a_directory_of_another_run_stops_everything_before_it_starts(
    study: Experiment, command_line: CommandLine, fake_start: list[str]
) -> None:
    other = study.runs[3].config
    leave_traces(other.model_copy(update={"seed": 99}), step=40)
    err = command_line("experiment", "run", study.source, code=2).err
    assert "root-seed2" in err
    assert "seed is 99 there and 2 here" in err
    assert fake_start == []


def test_status_counts_steps_tokens_losses_and_time(study: Experiment, command_line: CommandLine) -> None:
    leave_traces(study.runs[0].config, step=40, loss=2.5)
    out = command_line("experiment", "status", study.source, "--json").out
    first, second, *_ = json.loads(out)
    left = study.runs[0].config.plan().tokens - 40 * 4 * 64
    assert first.pop("eta_s") == pytest.approx(left / train_record().tokens_per_s)
    assert first == {
        "run": "base-seed1",
        "run_dir": str(study.runs[0].config.run_dir),
        "variant": "base",
        "seed": 1,
        "state": "interrupted",
        "step": 40,
        "steps": 100,
        "tokens": 40 * 4 * 64,
        "valid_loss": 2.5,
        "largest_ratio": 1.25,
        "seconds": 20.0,
        "job": None,
        "job_state": None,
        "note": "",
    }
    assert (second["state"], second["step"], second["valid_loss"]) == ("waiting", 0, None)
    out = command_line("experiment", "status", study.source).out
    assert "40/100" in out
    assert "1 interrupted" in out
    assert "3 waiting" in out


def test_a_dry_run_lists_plans_and_makes_nothing(
    study: Experiment, command_line: CommandLine, fake_start: list[str]
) -> None:
    out = command_line("experiment", "run", study.source, "--dry-run").out
    assert "4 runs, 400 steps" in out
    assert "root-seed2" in out
    assert fake_start == []
    assert not Path(study.config.output_dir).exists()


def test_a_variant_whose_plan_contradicts_itself_is_named_before_anything_starts(
    tmp_path: Path, command_line: CommandLine, fake_start: list[str]
) -> None:
    late = {"curriculum": {"duration": {"tokens": 10**9}}}
    study = load(tmp_path, output_dir=str(tmp_path / "out"), nproc=3, variants={"base": {}, "late": late})
    assert "variant late" in command_line("experiment", "run", study.source, code=2).err
    assert fake_start == []


def test_the_report_has_a_row_for_each_variant_and_goes_to_both_places(
    study: Experiment, command_line: CommandLine
) -> None:
    file = str(study.source)
    assert "no run of it has trained a step yet" in command_line("experiment", "report", file, code=2).err
    for run, loss in zip(study.runs[:3], (2.0, 3.0, 2.2), strict=True):
        leave_traces(run.config, step=100, loss=loss)
    out, err = command_line("experiment", "report", file)
    rows = [line for line in out.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| base (2 seeds) | 100 | 25.6K | 50.0 s | 2.5000 ± 0.7071 |")
    assert rows[3].startswith("| root | 100 |")
    assert len(rows) == 4
    page = Path(study.config.output_dir) / "report.html"
    assert str(page) in err
    assert "not everything is there yet: 1 waiting, 3 finished" in err
    assert "base (2 seeds)" in page.read_text()
    assert "ends in .html" in command_line("experiment", "report", file, "--output", "x.png", code=2).err


def test_a_real_run_stops_with_a_checkpoint_and_goes_on(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    write_config(tmp_path, training={"seq_len": 32, "batch_size": 8, "duration": {"steps": 60}})
    content = {"name": "real", "base": "run.json", "output_dir": str(tmp_path / "out"), "seeds": [1], "nproc": 1}
    file, one = tmp_path / "real.json", tmp_path / "one.json"
    file.write_text(json.dumps(content | {"variants": {"first": {}, "second": {"optimizer": {"eps": 1e-6}}}}))
    one.write_text(json.dumps(content | {"variants": {"first": {}}}))
    study = load_experiment(file)
    first = study.runs[0].config.run_dir
    with started("experiment", "run", str(file)) as process:
        wait_for_step(first, 12, process)
        assert [status.state for status in statuses(study)] == ["running", "waiting"]
        with pytest.raises(UserError, match="another process is training this experiment"):
            train_all(study, say=typer.echo)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=120)
        assert process.returncode == 0
    assert [status.state for status in statuses(study)] == ["interrupted", "waiting"]
    config = str(first.parent / "configs" / "first-seed1.json")
    assert not [item.pid for item in psutil.process_iter(["cmdline"]) if config in (item.info["cmdline"] or [])]
    assert records(first)[-1]["name"] == "preemption"
    done = cli("experiment", "run", str(one))
    assert done.returncode == 0, done.stderr
    assert [status.state for status in statuses(study)] == ["finished", "waiting"]
    assert [line["step"] for line in records(first) if line["kind"] == "train"] == list(range(1, 61))
