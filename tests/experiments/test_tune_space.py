"""Probes' configs, durations, and what they refuse."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.loading import parse_layers
from megatron_ext.config.merging import ConfigLayer
from megatron_ext.config.run import RunConfig
from megatron_ext.curriculum.pacings import LinearPacing, RootPacing
from megatron_ext.errors import UserError
from megatron_ext.experiments.tune_search import Candidate
from megatron_ext.experiments.tune_space import (
    DurationSpacing,
    ProbeSettings,
    TuneRun,
    default_starts,
    grid_of,
    unit_of,
)
from tests.config.builders import small_tree

SETTINGS = ProbeSettings(threshold=1.3, steps=20, validate_every=2, validation_samples=4)
LINEAR = {"pacing": "linear", "start": 16, "end": 96, "multiple": 16, "duration": {"tokens": 9999}}


def problem(**sections: Any) -> TuneRun:
    sections = {"learning_rate": {"peak": 1e-3, "warmup": {"steps": 10}}} | sections
    layers = (ConfigLayer("run.json", small_tree(**sections)),)
    return TuneRun(layers, parse_layers(layers), SETTINGS)


def test_a_probe_is_the_beginning_of_the_tuned_run(tmp_path: Path) -> None:
    base = problem()
    candidate = Candidate(8, 30)
    tuned, probe = base.tuned(candidate), base.probe_config(candidate, output_dir=str(tmp_path))
    assert tuned.curriculum == LinearPacing.model_validate(
        {"pacing": "linear", "start": 8, "multiple": 8, "duration": {"steps": 30}}
    )
    assert tuned.model_copy(update={"curriculum": base.config.curriculum}) == base.config, "nothing else changes"
    assert probe.determining_values() == tuned.determining_values()
    assert probe.run_dir == tmp_path / "s8_T30"
    assert probe.training.stop_after is not None
    assert probe.training.stop_after.steps == 20
    assert probe.validation.samples == 4
    assert base.probe_tokens(candidate) == base.plan(candidate).tokens_at_step(20)
    assert base.probe_tokens(candidate, steps=3) == 8 * (8 + 8 + 16)


def test_a_probe_has_no_guards(tmp_path: Path) -> None:
    guarded = problem(guards={"non_finite": "skip", "loss_ratio": {"above": 2.0, "action": "stop"}})
    assert not guarded.probe_config(Candidate(8, 30), output_dir=str(tmp_path)).guards.are_on
    assert guarded.tuned(Candidate(8, 30)).guards.are_on


def test_end_multiple_and_root_stay_as_the_run_has_them() -> None:
    tuned = problem(curriculum=LINEAR).tuned(Candidate(32, 40)).curriculum
    assert isinstance(tuned, LinearPacing)
    assert (tuned.end, tuned.multiple, tuned.start) == (96, 16, 32)
    assert tuned.duration.steps == 40
    assert tuned.duration.tokens is None
    root = problem(curriculum={"pacing": "root", "start": 8, "degree": 3, "duration": {"steps": 5}})
    pacing = root.tuned(Candidate(16, 40)).curriculum
    assert isinstance(pacing, RootPacing)
    assert pacing.degree == 3
    discrete = problem(curriculum={"pacing": "discrete", "stages": [{"seq_len": 8, "duration": {"steps": 5}}]})
    assert isinstance(discrete.tuned(Candidate(16, 40)).curriculum, LinearPacing)


def test_durations_are_units_in_a_ratio_as_far_as_the_run_goes() -> None:
    grid = grid_of(problem(), (8, 16), DurationSpacing(unit=10, ratio=1.5, first=3), beginning=10)
    assert grid.first == 30
    assert grid.durations == {8: (13, 20, 30, 45, 68), 16: (13, 20, 30, 45, 68)}
    given = grid_of(
        problem(), (8,), DurationSpacing(unit=10, ratio=2, first=3, given=(10, 25, 60, 99, 400)), beginning=10
    )
    assert given.first == 25
    assert given.durations == {8: (10, 25, 60, 99)}


def test_the_unit_is_the_warmup_of_the_learning_rate() -> None:
    assert unit(problem().config) == 10
    in_tokens = problem(learning_rate={"peak": 1e-3, "warmup": {"tokens": 1000}}).config
    assert unit(in_tokens) == 16  # 1000 / (8 * 8), rounded up
    with pytest.raises(UserError, match="--unit"):
        unit(problem(learning_rate={"peak": 1e-3}).config)


def unit(config: RunConfig) -> int:
    return unit_of(config.learning_rate.warmup, start=8, batch_size=config.training.batch_size)


def starts(config: RunConfig, *, parameters: int) -> tuple[int, ...]:
    return default_starts(config.curriculum, seq_len=config.training.seq_len, parameters=parameters)


def test_default_starts_suit_size_and_length() -> None:
    config = problem().config
    assert starts(config, parameters=10**8) == (8, 16, 32, 64)
    assert starts(config, parameters=2 * 10**9) == (64, 80, 96)
    assert starts(problem(curriculum=LINEAR).config, parameters=10**8) == (16, 32, 64)
    short = problem(training={"seq_len": 8, "batch_size": 8, "duration": {"steps": 100}}).config
    with pytest.raises(UserError, match="pass --starts"):
        starts(short, parameters=10**6)


THIRTY = DurationSpacing(unit=10, ratio=2, first=3)
WARMUP = {"batch_size_warmup": {"start": 4, "increment": 4, "duration": {"steps": 5}}}


@pytest.mark.parametrize(
    ("starts", "spacing", "training", "message"),
    [
        ((8, 8), THIRTY, {}, "different lengths, rising"),
        ((12,), THIRTY, {}, "curriculum.start is 12"),
        ((8,), replace(THIRTY, first=30), {}, "T = 300"),
        ((8,), replace(THIRTY, given=(30, 10)), {}, "different numbers of steps, rising"),
        ((8,), THIRTY, WARMUP, "batch_size_warmup"),
    ],
)
def test_what_does_not_suit_the_run_is_refused(
    starts: tuple[int, ...], spacing: DurationSpacing, training: dict[str, Any], message: str
) -> None:
    whole = {"seq_len": 128, "batch_size": 8, "duration": {"steps": 100}} | training
    with pytest.raises(UserError, match=message):
        grid_of(problem(training=whole), starts, spacing, beginning=10)
