"""The paper's studies under configs/experiments: what they hold, and their totals from the paper's formulas alone."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from megatron_ext.config.loading import load_config
from megatron_ext.experiments.config import Experiment, load_experiment

EXPERIMENTS = Path(__file__).parents[2] / "configs" / "experiments"
GPT2_TOKENS, GPT3_TOKENS = 157_286_400_000, 300_000_000_000
Steps = npt.NDArray[np.int64]
"""Tokens of each step."""


def study(name: str) -> Experiment:
    return load_experiment(EXPERIMENTS / f"{name}.json")


def totals(step_tokens: Steps, budget: int) -> tuple[int, int]:
    """Steps and tokens of a run that ends with the step that reaches the budget."""
    consumed = np.cumsum(step_tokens)
    steps = int(np.searchsorted(consumed, budget)) + 1
    return steps, int(consumed[steps - 1])


def constant(batch: int, length: int, steps: int = 700_000) -> Steps:
    return np.full(steps, batch * length, dtype=np.int64)


def warmup(batch: int, start: int, end: int, duration: int) -> Steps:
    """L(t) = s + (e - s) * min(t / T, 1), floored to a multiple of 8."""
    t = np.arange(duration, dtype=np.int64)
    lengths = (start * duration + (end - start) * t) // duration // 8 * 8
    return np.concatenate((batch * lengths, constant(batch, end)))


def shortformer(batch: int, short: int, steps: int, full: int) -> Steps:
    return np.concatenate((constant(batch, short, steps), constant(batch, full)))


def batch_warmup(start: int, end: int, increment: int, tokens: int, length: int) -> Steps:
    """Megatron's: the batch rises by the increment each time another share of the warmup's samples is consumed."""
    samples, rises = tokens // length, (end - start) // increment
    batches, consumed = [], 0
    while (size := min(end, start + consumed * rises // samples * increment)) < end:
        batches.append(size)
        consumed += size
    return np.concatenate((np.array(batches, dtype=np.int64) * length, constant(end, length)))


def mixed(batch: int, lengths: tuple[int, ...]) -> Steps:
    """The mean length on every step: whole cycles of equally frequent lengths."""
    return constant(batch, sum(lengths) // len(lengths))


@pytest.mark.parametrize(("size", "start", "duration", "short"), [("117m", 8, 18_750, 128), ("1.5b", 64, 45_000, 128)])
def test_gpt2_stability_grid(size: str, start: int, duration: int, short: int) -> None:
    experiment = study(f"gpt2_{size}_stability")
    large = totals(constant(4096, 1024), GPT2_TOKENS)
    wanted = {
        "baseline-512": totals(constant(512, 1024), GPT2_TOKENS),
        "slw-512": totals(warmup(512, start, 1024, 150_000), GPT2_TOKENS),
        "baseline-4096": large,
        "slw-4096": totals(warmup(4096, start, 1024, duration), GPT2_TOKENS),
        "batch-size-warmup-4096": totals(batch_warmup(256, 4096, 256, 2_097_152_000, 1024), GPT2_TOKENS),
        "shortformer-4096": totals(shortformer(4096, short, duration, 1024), GPT2_TOKENS),
        "mixed-4096": totals(mixed(4096, (256, 512, 768, 1024)), GPT2_TOKENS),
        "stronger-clipping-4096": large,
        "longer-lr-warmup-4096": large,
    }
    assert wanted["baseline-512"] == (300_000, GPT2_TOKENS)
    assert wanted["baseline-4096"] == (37_500, GPT2_TOKENS)
    assert len(experiment.runs) == 18
    for run in experiment.runs:
        variant, _, peak = run.variant.partition("_peak=")
        plan = run.config.plan()
        assert (plan.steps, plan.tokens) == wanted[variant], run.variant
        assert run.config.learning_rate.peak == float(peak)
        assert run.config.training.batch_size == int(variant.rpartition("-")[2])
        assert run.config.model == load_config(EXPERIMENTS.parent / "gpt2" / f"{size}_baseline.json").model
    assert {run.config.learning_rate.peak for run in experiment.runs} == {1.5e-4, 6e-4}


def test_gpt3_with_ten_times_less_data() -> None:
    experiment = study("gpt3_125m_less_data")
    original = batch_warmup(16, 256, 16, 4_000_000_000, 2048)
    slw, baseline = warmup(2048, 72, 2048, 3_576), constant(2048, 2048)
    wanted = {
        "original-300b": totals(original, GPT3_TOKENS),
        "original-30b": totals(original, GPT3_TOKENS // 10),
        "baseline-lr-4x": totals(baseline, GPT3_TOKENS // 10),
        "baseline-lr-40x": totals(baseline, GPT3_TOKENS // 10),
        "slw-lr-4x": totals(slw, GPT3_TOKENS // 10),
        "slw-lr-40x": totals(slw, GPT3_TOKENS // 10),
    }
    found = {run.variant: run.config.plan() for run in experiment.runs}
    assert {name: (plan.steps, plan.tokens) for name, plan in found.items()} == wanted
    for run in experiment.runs:
        factor = int(run.variant.rpartition("-lr-")[2].removesuffix("x")) if "-lr-" in run.variant else 1
        assert run.config.learning_rate.peak == pytest.approx(6e-4 * factor)
        assert run.config.training.batch_size == (256 if "original" in run.variant else 2048)


@pytest.mark.parametrize(
    "path", sorted(EXPERIMENTS.glob("*/*.json")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_part_of_a_study_is_a_run_by_itself(path: Path) -> None:
    assert load_config(path).name
