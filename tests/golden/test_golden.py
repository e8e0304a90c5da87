"""Losses are what they were: of a fixed run, and of runs of an older version that this one carries on."""

import json
import shutil
from pathlib import Path

import pytest

from tests.golden.golden import CONFIG, LOSSES, compare, golden_records, records, train

OLD = Path(__file__).parent / "run-0.1"


def test_the_losses_of_a_fixed_run_are_those_on_record(tmp_path: Path) -> None:
    recorded = json.loads(LOSSES.read_text())
    assert recorded["config"] == CONFIG, "make golden"
    compare(golden_records(tmp_path), recorded["records"], origin=recorded)


@pytest.mark.parametrize(
    "name",
    [
        "plain",  # linear pacing whose tail is recycled, dropout, ZeRO 1
        "adaptive",  # adaptive pacing and a guard, after steps back and eight rollbacks; ZeRO 0
    ],
)
def test_a_run_of_version_0_1_goes_on_as_it_would_have(tmp_path: Path, name: str) -> None:
    for file in OLD.glob("corpus.*"):
        shutil.copy(file, tmp_path)
    shutil.copytree(OLD / name, tmp_path / name)
    config = json.loads((tmp_path / name / "config.json").read_text())
    before = records(tmp_path / name / "metrics.jsonl")
    config["training"]["stop_after"] = None
    found = records(train(tmp_path, config) / "metrics.jsonl")
    whole = records(OLD / f"{name}.whole.jsonl")
    assert found[: len(before)] == before, "what was recorded stays"
    stopped = before[-1]  # the validation where the run stopped, which the whole run has not
    assert stopped["kind"] == "eval"
    found.remove(stopped)
    compare(found, whole, origin=json.loads((OLD / "platform.json").read_text()))
