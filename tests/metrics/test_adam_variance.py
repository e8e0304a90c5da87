"""Adam's variance on every layout against torch's AdamW on one rank, and against the definition."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.config.run import RunConfig
from megatron_ext.config.training import MetricsConfig
from megatron_ext.engine.second_moments import SecondMoment
from megatron_ext.metrics.adam_variance import AdamVariance, batches
from megatron_ext.model.parameters import parameter_kind
from megatron_ext.parallel.groups import destroy_parallel
from tests.engine.training import CPU, Setup, run_steps, set_up
from tests.metrics.variance_runs import (
    GivenMoments,
    Measured,
    Norms,
    measure_layouts,
    measure_run,
    norms,
    reference_and_layouts,
    variance_config,
)
from tests.ranks import run_ranks, single_rank


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process as the only rank of a group."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)
    with single_rank():
        yield


def layout(tensor: int, zero_stage: int, precision: str = "fp32") -> str:
    training = {"seq_len": 32, "batch_size": 12, "duration": {"steps": 36}, "precision": precision}
    parallel = {"tensor": tensor, "zero_stage": zero_stage, "micro_batch_tokens": 64}
    return variance_config(parallel=parallel, training=training).model_dump_json()


@pytest.fixture(scope="module")
def one_rank() -> tuple[Norms, list[Measured]]:
    """torch's run, and the engine's on one rank."""
    result: tuple[Norms, list[Measured]] = run_ranks(
        reference_and_layouts, 1, variance_config().model_dump_json(), [layout(1, 0), layout(1, 1)]
    )[0]
    return result


def assert_measured(measured: Measured, reference: Norms, rtol: float) -> None:
    expected = [norm for norm, _ in reference.values()] + [largest for _, largest in reference.values()]
    np.testing.assert_allclose(measured.values, expected, rtol=rtol)
    summary = measured.summary
    np.testing.assert_allclose((summary.l1, summary.largest), together(reference), rtol=rtol)
    assert set(summary.layers) == {"0", "1"}
    assert set(summary.kinds) == {"embedding", "positions", "attention", "mlp", "norm"}
    for index, pair in summary.layers.items():
        part = {name: norms for name, norms in reference.items() if f".layers.{index}." in name}
        np.testing.assert_allclose(pair, together(part), rtol=rtol)
    for kind, pair in summary.kinds.items():
        part = {name: norms for name, norms in reference.items() if parameter_kind(name) == kind}
        np.testing.assert_allclose(pair, together(part), rtol=rtol)
    assert set(measured.before) == {0.0}
    assert measured.counted == measured.elements
    assert measured.with_garbage == measured.values


def together(reference: Norms) -> tuple[float, float]:
    return math.fsum(norm for norm, _ in reference.values()), max(largest for _, largest in reference.values())


def test_one_rank(one_rank: tuple[Norms, list[Measured]]) -> None:
    reference, measured = one_rank
    assert [item.wrapper for item in measured] == ["AdamW", "DeepSpeedZeroOptimizer"]
    for item in measured:
        assert_measured(item, reference, 1e-5)


@pytest.mark.parametrize(
    ("ranks", "layouts"), [(2, [(1, 0), (1, 1), (1, 2), (1, 3), (2, 1)]), (4, [(2, 0), (2, 1), (2, 3)])]
)
def test_layouts(one_rank: tuple[Norms, list[Measured]], ranks: int, layouts: list[tuple[int, int]]) -> None:
    reference, _ = one_rank
    results = run_ranks(measure_layouts, ranks, [layout(*place) for place in layouts])
    for other in results[1:]:
        assert [item.values for item in other] == [item.values for item in results[0]], "ranks disagree"
    for measured in results[0]:
        assert_measured(measured, reference, 1e-5)


def test_half_precision_against_whole_second_moments() -> None:
    # Three ranks: no size of the model is divisible by three, so that every partition is filled up.
    results: list[Measured] = run_ranks(measure_layouts, 3, [layout(1, stage, "bf16") for stage in (0, 1, 2, 3)])[0]
    assert [item.wrapper for item in results] == [
        "FP16_UnfusedOptimizer",
        "BF16_Optimizer",
        "DeepSpeedZeroOptimizer",
        "DeepSpeedZeroOptimizer_Stage3",
    ]
    for measured in results:
        assert_measured(measured, measured.gathered, 1e-6)
    assert [item.padding > 0 for item in results] == [False, True, True, True]


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")])
def test_a_checkpoint_brings_the_second_moments_back(tmp_path: Path, zero_stage: int, precision: str) -> None:
    def started() -> tuple[Setup, AdamVariance]:
        setup = set_up(RunConfig.model_validate_json(layout(1, zero_stage, precision)))
        return setup, AdamVariance(setup.engine, setup.config.metrics, CPU.torch_device)

    setup, variance = started()
    run_steps(setup, 0, 2)
    setup.engine.save(tmp_path, "two")
    at_two = variance.measure().tolist()
    run_steps(setup, 2, 3)
    at_three = variance.measure().tolist()
    assert at_two != at_three
    destroy_parallel()
    setup, variance = started()
    setup.engine.load(tmp_path, "two")
    assert variance.measure().tolist() == at_two
    run_steps(setup, 2, 3)
    assert variance.measure().tolist() == at_three


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_offloaded_state(one_rank: tuple[Norms, list[Measured]], zero_stage: int) -> None:
    base = variance_config(parallel={"zero_stage": zero_stage, "offload_optimizer": "cpu", "micro_batch_tokens": 64})
    # DeepSpeed's own CPU optimizer keeps the same state but has to be compiled.
    config = base.model_copy(
        update={
            "optimizer": base.optimizer.model_copy(update={"implementation": "torch"}),
            "deepspeed": {"zero_force_ds_cpu_optimizer": False},
        }
    )
    assert_measured(measure_run(config), one_rank[0], 1e-5)


@pytest.mark.usefixtures("alone")
def test_measures_where_due_and_only_there() -> None:
    config = variance_config(metrics={"adam_variance_every": 2})
    setup = set_up(config)
    count = 2 * len(list(setup.engine.module.parameters()))
    variance = AdamVariance(setup.engine, config.metrics, CPU.torch_device)
    measured = [variance.measure_after(setup.plan[step]) for step in range(4)]
    assert [None if values is None else values.shape for values in measured] == [None, (count,), None, (count,)]
    off = config.metrics.model_copy(update={"adam_variance_every": 0})
    never = AdamVariance(setup.engine, off, CPU.torch_device)
    assert all(never.measure_after(setup.plan[step]) is None for step in range(4))


class TestReductions:
    """The norms of given second moments, without an optimizer."""

    @pytest.fixture
    def variance(self) -> Iterator[tuple[AdamVariance, GivenMoments]]:
        given = GivenMoments(["a.layers.0.mlp.x", "a.layers.11.self_attention.y", "word_embeddings"])
        with single_rank():
            yield AdamVariance(given, MetricsConfig(), CPU.torch_device), given  # type: ignore[arg-type]

    def test_large_tensors_keep_their_digits(self, variance: tuple[AdamVariance, GivenMoments]) -> None:
        measure, given = variance
        # Float32 added up one by one would be off by about 0.1 % here.
        v = torch.rand(3_000_000, generator=torch.Generator().manual_seed(1)) ** 8 * 1e-6
        v[2_500_000] = 7.0
        given.moments = [SecondMoment("a.layers.11.self_attention.y", v)]
        summary = measure.summary(measure.measure().tolist())
        np.testing.assert_allclose((summary.l1, summary.largest), norms(v), rtol=1e-6)
        assert summary.layers == {"0": (0.0, 0.0), "11": (summary.l1, summary.largest)}
        assert summary.kinds["embedding"] == (0.0, 0.0)
        # State of low precision is summed in float32.
        low = v[:5000].bfloat16()
        given.moments = [SecondMoment("word_embeddings", low)]
        summary = measure.summary(measure.measure().tolist())
        np.testing.assert_allclose((summary.l1, summary.largest), norms(low), rtol=1e-6)

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_what_is_not_finite_stays_where_it_is(
        self, variance: tuple[AdamVariance, GivenMoments], bad: float
    ) -> None:
        measure, given = variance
        given.moments = [
            SecondMoment(given.names[0], torch.tensor([4.0, bad, 1.0])),
            SecondMoment(given.names[2], torch.ones(2)),
        ]
        summary = measure.summary(measure.measure().tolist())
        np.testing.assert_equal((summary.l1, summary.largest), (bad, bad))
        np.testing.assert_equal(summary.layers["0"], (bad, bad))
        assert summary.kinds["embedding"] == (2.0, 1.0)

    @given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.integers(1, 60))
    def test_batches_cover_all_parts_within_the_bound(self, sizes: list[int], together: int) -> None:
        ranges = list(batches(sizes, together))
        assert [place for start, end in ranges for place in range(start, end)] == list(range(len(sizes)))
        assert all(end - start == 1 or sum(sizes[start:end]) <= together for start, end in ranges)
        for (start, middle), (_, end) in pairwise(ranges):
            assert sum(sizes[start:middle]) + sizes[middle] > together
            assert end > middle
