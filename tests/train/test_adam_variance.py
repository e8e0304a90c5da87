"""Adam's variance in the metrics of a whole run, and through a resume."""

from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.runtime.environment import rank_info
from megatron_ext.runtime.process_group import process_group
from megatron_ext.runtime.signals import StopRequest
from megatron_ext.trainer import train
from tests.engine.training import CPU
from tests.train.small_run import train_records, write_config, write_corpus


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    write_corpus(tmp_path)
    training = {"seq_len": 32, "batch_size": 8, "duration": {"steps": 8}}
    curriculum = {"pacing": "linear", "start": 8, "duration": {"steps": 6}}
    metrics = {"tensorboard": False, "flush_every": 3, "adam_variance_every": 2, "adam_variance_detail": True}
    validation: dict[str, Any] = {"samples": 4}
    return write_config(
        tmp_path, training=training, curriculum=curriculum, metrics=metrics, validation=validation, checkpoint={}
    )


def run(config: Path, name: str, *overrides: str) -> list[dict[str, Any]]:
    """Train in this process and return the train records."""
    parsed = load_config(config, [f"name={name}", *overrides])
    with process_group(rank_info(), CPU, timeout_minutes=1.0) as processes:
        train(parsed, device=CPU, processes=processes, stop=StopRequest())
    return train_records(parsed.run_dir)


def test_recorded_where_due_and_unchanged_by_a_resume(config: Path) -> None:
    whole = run(config, "whole")
    assert [record["step"] for record in whole if "adam_var_l1" in record] == [2, 4, 6, 8]
    for record in whole[1::2]:
        assert 0 < record["adam_var_max"] < record["adam_var_l1"]
        detail = record["adam_var"]
        assert set(detail["layers"]) == {"0", "1"}
        assert sum(l1 for l1, _ in detail["kinds"].values()) == pytest.approx(record["adam_var_l1"])
        assert max(largest for _, largest in detail["kinds"].values()) == record["adam_var_max"]
    run(config, "parts", 'training.stop_after={"steps": 5}')
    assert run(config, "parts") == whole, "variance and loss ratio go on where they were"
    short = run(config, "short", "metrics.adam_variance_detail=false", 'training.stop_after={"steps": 2}')
    assert "adam_var" not in short[1]
    assert short[1]["adam_var_l1"] == whole[1]["adam_var_l1"]
    assert (
        "adam_var_l1" not in run(config, "off", "metrics.adam_variance_every=0", 'training.stop_after={"steps": 2}')[1]
    )
