"""megatron-ext validate."""

import json
import re
from pathlib import Path

import pytest
import typer

from megatron_ext.cli.validate import command, summary
from megatron_ext.config.loading import load_config
from megatron_ext.config.messages import ConfigError
from megatron_ext.config.resolved import read_config
from megatron_ext.errors import UserError
from tests.config.builders import small_config, small_tree, write


def test_a_valid_config_is_summed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.json", small_tree())
    command(path, ["training.batch_size=4", "name=mine"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"OK: {path}"
    text = "\n".join(lines)
    for words in (
        "runs/mine",
        "2 layers, width 64, 4 heads",
        "100 steps, 4 sequences of up to 128 tokens",
        "0.001",
        "100 steps, 51,200 tokens, 400",
    ):
        assert words in text


def test_a_wrong_config_raises_all_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        command(write(tmp_path / "run.json", small_tree(seed=-1, lr=3)))
    assert len(caught.value.problems) == 2


def test_the_resolved_config_is_written_for_other_launchers(tmp_path: Path) -> None:
    path, output = write(tmp_path / "run.json", small_tree()), tmp_path / "resolved.json"
    command(path, ["name=mine"], output=output)
    assert read_config(output) == load_config(path, ["name=mine"])
    with pytest.raises(UserError, match="cannot be written"):
        command(path, output=tmp_path)


def test_json_has_the_resolved_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.json", small_tree())
    command(path, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    assert (answer["steps"], answer["tokens"], answer["samples"]) == (100, 100 * 8 * 128, 800)
    assert answer["digest"] == small_config().digest()
    assert answer["config"] == small_config().model_dump(mode="json")


def test_json_lists_the_problems_and_exits_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "run.json", small_tree(seed=-1, lr=3))
    with pytest.raises(typer.Exit) as exited:
        command(path, as_json=True)
    assert exited.value.exit_code == 2
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is False
    assert [problem.split(": ")[1] for problem in answer["problems"]] == ["seed is -1", "lr"]
    with pytest.raises(typer.Exit):
        command(tmp_path / "nowhere.json", as_json=True)
    assert "does not exist" in json.loads(capsys.readouterr().out)["problems"][0]
    with pytest.raises(UserError):
        command(tmp_path / "nowhere.json")


def test_durations_that_only_the_plan_can_compare_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "run.json", small_tree(learning_rate={"warmup": {"tokens": 10**9}}))
    with pytest.raises(UserError, match=r"run\.json: learning_rate\.warmup is 1,000,000,000 tokens"):
        command(path)


STEPS = {"duration": {"steps": 50}}
LINEAR = {"pacing": "linear", "start": 8, **STEPS}
WARMUP = {"batch_size_warmup": {"start": 2, "increment": 2, **STEPS}}


def test_curriculum_and_batch_size_warmup_are_described() -> None:
    assert any("linear: 8 to 128 over 50 steps" in line for line in summary(small_config(curriculum=LINEAR)))
    assert any("from 2 by 2 over 50 steps" in line for line in summary(small_config(training=WARMUP)))


def test_adaptive_pacing_is_described_with_both_bounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    curriculum = {"pacing": "adaptive", "start": 8, "fastest": {"steps": 20}, "slowest": {"steps": 50}}
    tree = small_tree(curriculum=curriculum, training={"duration": {"tokens": 80_000}})
    command(write(tmp_path / "run.json", tree))
    text = capsys.readouterr().out
    assert "adaptive: 8 to 128 over 20 steps at the fastest to 50 steps at the slowest, a decision every 20" in text
    assert re.search(r"plan +89 to 104 steps, 80,000 tokens or up to a batch more, at most 832 samples", text), text
