"""training.stop_after: a run that stops at a point of its plan and goes on is the run that never stopped."""

import json
from pathlib import Path

import pytest
import torch

from megatron_ext.config.loading import load_config
from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.trainer import train
from tests.ranks import run_ranks
from tests.train.small_run import records, train_records, write_config, write_corpus

CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")
TRAINING = {"seq_len": 32, "batch_size": 4, "duration": {"steps": 12}}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stop-after")
    write_corpus(folder)
    curriculum = {"pacing": "linear", "start": 8, "duration": {"steps": 8}}
    metrics = {"tensorboard": False, "flush_every": 5, "keep_sample_ids": True}
    nothing_due = {"validation": {"samples": 4}, "checkpoint": {}}
    return write_config(folder, training=TRAINING, curriculum=curriculum, metrics=metrics, **nothing_due)


@pytest.fixture(autouse=True)
def as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def run(config: Path, name: str, *overrides: str) -> Path:
    """Train in this process and return the run directory."""
    parsed = load_config(config, [f"name={name}", *overrides])
    with process_group(rank_info(), CPU, timeout_minutes=1.0) as processes:
        train(parsed, device=CPU, processes=processes, stop=StopRequest())
    return parsed.run_dir


def steps_of(run_dir: Path, kind: str) -> list[int]:
    return [line["step"] for line in records(run_dir) if line["kind"] == kind]


def test_stopped_run_validates_saves_and_goes_on_exactly(config: Path) -> None:
    whole = run(config, "whole")
    parts = run(config, "parts", 'training.stop_after={"steps": 5}')
    assert steps_of(parts, "train") == [1, 2, 3, 4, 5]
    assert steps_of(parts, "eval") == [5]
    assert (parts / "checkpoints" / "latest").read_text() == "step_5\n"
    before = [record for record in train_records(whole) if record["step"] <= 5]
    assert train_records(parts) == before, "schedules are those of the whole run"
    later = before[-1]["tokens"] + 1  # reached by the sixth step
    run(config, "parts", f'training.stop_after={{"tokens": {later}}}')
    assert steps_of(parts, "train") == [1, 2, 3, 4, 5, 6]
    run(config, "parts", 'training.stop_after={"steps": 6}')
    assert steps_of(parts, "train") == [1, 2, 3, 4, 5, 6], "already there: nothing is trained"
    run(config, "parts")
    assert train_records(parts) == train_records(whole)
    assert steps_of(parts, "eval") == [5, 6, 12]
    assert json.loads((parts / "plan.json").read_text()) == json.loads((whole / "plan.json").read_text())


def test_a_stop_beyond_the_end_is_the_end(config: Path) -> None:
    beyond = run(config, "beyond", 'training.stop_after={"steps": 99}')
    assert steps_of(beyond, "train")[-1] == 12
    assert steps_of(beyond, "eval") == [12]


def test_a_finished_run_says_so(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(config, "finished")
    assert "finished" not in caplog.text
    with caplog.at_level("INFO"):
        finished = run(config, "finished")
    assert "step 12 of 12: the run is finished" in caplog.text
    assert steps_of(finished, "train") == list(range(1, 13))


def test_validations_do_not_change_training(config: Path) -> None:
    often = run(config, "often", 'validation.every={"steps": 1}')
    assert steps_of(often, "eval") == list(range(1, 13))
    assert train_records(often) == train_records(run(config, "once"))


def test_a_new_run_among_the_checkpoints_of_another_is_refused(config: Path) -> None:
    first = run(config, "taken", 'training.stop_after={"steps": 3}')
    before = (first / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match=r"checkpoint.resume is false and .* the newest step_3"):
        run(config, "taken", "checkpoint.resume=false")
    assert (first / "metrics.jsonl").read_text() == before, "nothing is lost"


def broken_metrics(_rank: int, _world_size: int, config: str) -> str:
    with pytest.raises(UserError) as caught:
        run(Path(config), "broken")
    return str(caught.value)


def test_what_only_the_first_rank_finds_ends_every_rank_with_one_message(config: Path) -> None:
    folder = config.parent / "broken"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("no record\n")
    messages = run_ranks(broken_metrics, 2, str(config), init=False)
    assert messages[0] == messages[1]
    assert "metrics.jsonl, line 1: not a metrics record" in messages[0]
