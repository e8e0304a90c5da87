"""The tune command."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.cli.tune import command
from megatron_ext.config.loading import load_config
from megatron_ext.errors import UserError
from tests.config.builders import small_tree, write
from tests.train.small_run import cli, records, write_config, write_corpus


def config(tmp_path: Path, **sections: Any) -> Path:
    sections = {"learning_rate": {"peak": 1e-3, "warmup": {"steps": 10}}} | sections
    return write(tmp_path / "run.json", small_tree(**sections))


def test_dry_run_lists_probes_and_bounds_the_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(config(tmp_path), durations="20,40,60,80", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Probes of 20 steps")
    assert lines[1] == "  s =    8, T = 20, 40, 60, 80"
    assert [line.split(",")[0] for line in lines[1:5]] == [f"  s = {start:4d}" for start in (8, 16, 32, 64)]
    assert lines[5].startswith("At most 7 probes and ")
    assert not list(tmp_path.glob("*tune*"))
    # One start and two T, compared at the first: its probe, and that of the second where the first is stable.
    command(config(tmp_path), starts="128", durations="30,60", probe_steps=5, dry_run=True)
    assert f"At most 2 probes and {2 * 5 * 8 * 128:,} tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts": "8,x"}, "--starts is '8,x'"),
        ({"durations": "0"}, "--durations is '0'"),
        ({"starts": "16,8"}, "different lengths, rising"),
        ({"threshold": 1.0}, "--threshold is 1"),
        ({"notch": float("nan")}, "--notch is nan"),
        ({"first": 50}, "training.duration"),
        ({"overrides": ["learning_rate.warmup=null"]}, "--unit"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        command(config(tmp_path), dry_run=True, **arguments)


@pytest.mark.slow
def test_probes_through_the_launcher_end_in_a_config_that_trains(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    run = write_config(tmp_path, training={"seq_len": 32, "batch_size": 8, "duration": {"steps": 80}})
    override = "optimizer.weight_decay=0.05"
    options = ["--starts", "8", "--durations", "15,40", "--probe-steps", "10", "--validate-every", "2", "--nproc", "1"]
    done = cli("tune", str(run), "--set", override, *options, timeout=600)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "small_tune"
    assert "tuned: s = 8, T = 40" in done.stdout
    assert load_config(folder / "tuned.json") == load_config(
        run, [override, 'curriculum={"pacing": "linear", "start": 8, "duration": {"steps": 40}}']
    )
    for name in ("s8_T15", "s8_T40"):
        steps = [record["step"] for record in records(folder / "probes" / name) if record["kind"] == "eval"]
        assert steps == [2, 4, 6, 8, 10]
    assert (folder / "report.png").is_file()
    assert len(json.loads((folder / "tune.json").read_text())["probes"]) == 2


@pytest.mark.slow
def test_a_diverging_probe_is_stopped_long_before_its_end(tmp_path: Path) -> None:
    write_corpus(tmp_path)
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 20_000}}
    run = write_config(tmp_path, training=training, learning_rate={"peak": 30.0, "warmup": {"steps": 5}})
    options = ["--starts", "8", "--durations", "15", "--probe-steps", "10000", "--validate-every", "2", "--nproc", "1"]
    done = cli("tune", str(run), *options, timeout=600)
    assert done.returncode == 2
    assert "no curriculum without fluctuations was found" in done.stderr
    probe = tmp_path / "small_tune" / "probes" / "s8_T15"
    trained = [record["step"] for record in records(probe) if record["kind"] == "train"]
    assert trained[-1] < 2000
    assert not (probe / "checkpoints").exists()
