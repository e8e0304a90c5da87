"""Adaptive pacing in real runs: stopped and resumed in its middle, and on two ranks."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_ext.build import build_run
from megatron_ext.config.loading import load_config
from megatron_ext.curriculum.segments import Segment
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.trainer import run_loop
from tests.ranks import run_ranks
from tests.train.small_run import records, train_records, write_config, write_corpus

CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")
# A learning rate at which this little model becomes unstable, and thresholds near the noise, so that actions differ.
SECTIONS: dict[str, Any] = {
    "training": {"seq_len": 32, "batch_size": 4, "duration": {"tokens": 2800}},
    "curriculum": {
        "pacing": "adaptive",
        "start": 8,
        "multiple": 2,
        "fastest": {"steps": 16},
        "slowest": {"steps": 36},
        "interval": 4,
        "smoothing": 3,
        "hold_above": 1.002,
        "back_above": 1.01,
        "variance_above": 1.5,
        "back": 1,
    },
    "learning_rate": {"peak": 0.3, "warmup": {"steps": 4}},
    "metrics": {"tensorboard": False, "flush_every": 3, "keep_sample_ids": True, "adam_variance_every": 2},
    "validation": {"samples": 4},
    "checkpoint": {},
}
STOP = 18  # two steps after a decision and two before the next, on no multiple of flush_every but its own


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adaptive")
    write_corpus(folder)
    return write_config(folder, **SECTIONS)


@pytest.fixture(autouse=True)
def as_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


def train_here(config: Path, name: str, *overrides: str) -> tuple[Segment, ...]:
    """Train as this process's rank; the plan as it was in the end."""
    parsed = load_config(config, [f"name={name}", *overrides])
    with (
        process_group(rank_info(), CPU, timeout_minutes=1.0) as processes,
        build_run(parsed, device=CPU, processes=processes) as run,
    ):
        run_loop(run, StopRequest())
        return tuple(run.plan.segments)


def train_on_rank(_rank: int, _world_size: int, config: str, name: str, *overrides: str) -> tuple[Segment, ...]:
    return train_here(Path(config), name, *overrides)


def decisions(run: Path) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["kind"] == "event" and record["name"] == "pacing"]


def test_a_run_resumed_between_decisions_is_the_run_that_never_stopped(config: Path) -> None:
    whole = train_here(config, "whole")
    run = config.parent / "whole"
    assert len({decision["action"] for decision in decisions(run)}) > 1
    train_here(config, "parts", f'training.stop_after={{"steps": {STOP}}}')
    manifest = json.loads((config.parent / "parts" / "checkpoints" / f"step_{STOP}" / "checkpoint.json").read_text())
    assert manifest["curriculum"]["watch"]["lowest"]
    # Another flush interval must not change what is decided.
    assert train_here(config, "parts", "metrics.flush_every=1") == whole
    assert train_records(config.parent / "parts") == train_records(run)
    assert decisions(config.parent / "parts") == decisions(run)


def test_two_ranks_decide_alike_and_plan_json_shows_the_bounds(config: Path) -> None:
    plans = run_ranks(train_on_rank, 2, str(config), "two", timeout=120.0, init=False)
    assert plans[0] == plans[1]
    run = config.parent / "two"
    told = decisions(run)
    assert len({decision["action"] for decision in told}) > 1
    assert [record["seq_len"] for record in train_records(run) if record["step"] in {d["step"] + 1 for d in told}] == [
        decision["seq_len"] for decision in told
    ]
    bounds = json.loads((run / "plan.json").read_text())["bounds"]
    steps = len(train_records(run))
    assert bounds["fastest"]["steps"] <= steps <= bounds["slowest"]["steps"]
    first = told[0]
    assert {"step", "tokens", "action", "seq_len", "reason"} <= first.keys()
    tokens = {record["step"]: record["tokens"] for record in train_records(run)}
    assert first["tokens"] == tokens[first["step"]]
