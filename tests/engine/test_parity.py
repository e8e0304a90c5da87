"""The same run on every layout gives the same curve: real processes, one optimizer step after the other."""

import math
from typing import Any

import numpy as np
import pytest

from tests.engine.training import Curve, small_config, train_rank
from tests.ranks import run_ranks

TOLERANCE = 1e-4


def curve_of(ranks: int, **sections: dict[str, Any]) -> Curve:
    curves: list[Curve] = run_ranks(train_rank, ranks, small_config(**sections).model_dump_json())
    for other in curves[1:]:
        np.testing.assert_allclose(other.losses, curves[0].losses, rtol=1e-6, err_msg="ranks disagree about the loss")
    return curves[0]


@pytest.fixture(scope="module")
def reference() -> Curve:
    """One rank, no ZeRO, one sequence of full length at a time."""
    return curve_of(1, parallel={"zero_stage": 0, "micro_batch_tokens": 32})


def assert_same_run(curve: Curve, reference: Curve) -> None:
    assert curve.seq_lens == reference.seq_lens
    np.testing.assert_allclose(curve.losses, reference.losses, atol=TOLERANCE, rtol=0)
    np.testing.assert_allclose(curve.grad_norms, reference.grad_norms, rtol=1e-3)


def test_reference_learns_over_several_lengths(reference: Curve) -> None:
    assert sorted(set(reference.seq_lens)) == [8, 16, 24, 32]
    assert reference.losses[0] == pytest.approx(math.log(96), rel=0.01)
    assert reference.losses[-1] < 0.85 * reference.losses[0]
    assert {len(sizes) for sizes in reference.micro_batches} == {2, 4, 8}


@pytest.mark.parametrize(
    ("tensor", "data", "zero_stage"), [(1, 1, 1), (1, 2, 0), (1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 1, 1), (2, 2, 1)]
)
@pytest.mark.parametrize("micro_batch_tokens", [32, 96])
def test_layouts_agree(reference: Curve, tensor: int, data: int, zero_stage: int, micro_batch_tokens: int) -> None:
    parallel = {"tensor": tensor, "zero_stage": zero_stage, "micro_batch_tokens": micro_batch_tokens}
    assert_same_run(curve_of(tensor * data, parallel=parallel), reference)


def test_tensor_parallel_without_zero_counts_copies_once(reference: Curve) -> None:
    assert_same_run(curve_of(2, parallel={"tensor": 2, "zero_stage": 0}), reference)


def test_recomputed_activations_change_nothing(reference: Curve) -> None:
    assert_same_run(curve_of(1, parallel={"activation_checkpointing": "full"}), reference)


def test_recomputed_activations_under_zero_3(reference: Curve) -> None:
    assert_same_run(curve_of(2, parallel={"activation_checkpointing": "full", "zero_stage": 3}), reference)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_follows_fp32(reference: Curve, zero_stage: int) -> None:
    curve = curve_of(2, training={"precision": "bf16"} | _budget(), parallel={"zero_stage": zero_stage})
    np.testing.assert_allclose(curve.losses, reference.losses, rtol=0.05)


@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("zero_stage", [0, 1])
def test_clipping_by_us_and_by_deepspeed_agree(clip: float, zero_stage: int) -> None:
    ours = curve_of(1, optimizer={"clip_grad": clip}, parallel={"zero_stage": 0})
    other = curve_of(2, optimizer={"clip_grad": clip}, parallel={"zero_stage": zero_stage})
    assert max(ours.grad_norms) > 0.05, "the norm is reported before clipping"
    assert_same_run(other, ours)


def _budget() -> dict[str, Any]:
    return {"seq_len": 32, "batch_size": 8, "duration": {"steps": 36}}
