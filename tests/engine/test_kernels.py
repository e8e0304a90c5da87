"""A run's loss curve does not depend on which kernels compute it: 50 steps over four lengths."""

from typing import Any

import numpy as np
import pytest

from tests.engine.training import Curve, small_config, train_rank
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("fused")

DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}


def curve_of(
    kernels: str, *, precision: str = "fp32", ranks: int = 1, parallel: dict[str, Any] | None = None, **model: Any
) -> Curve:
    config = small_config(
        model={"kernels": kernels} | model,
        training={"seq_len": 32, "batch_size": 8, "duration": {"steps": 50}, "precision": precision},
        curriculum={"pacing": "linear", "start": 8, "duration": {"steps": 40}},
        learning_rate={"peak": 3e-3, "warmup": {"steps": 5}},
        parallel={"micro_batch_tokens": 64} | (parallel or {}),
    )
    curves: list[Curve] = run_ranks(train_rank, ranks, config.model_dump_json())
    return curves[0]


@pytest.mark.parametrize(
    ("ranks", "parallel", "model"),
    [
        (1, {"zero_stage": 0}, {}),
        (2, {"activation_checkpointing": "full", "zero_stage": 3}, DROPOUT | {"attention": "fused_softmax"}),
        (2, {"tensor": 2}, DROPOUT | {"attention": "fused_softmax", "activation": "gelu_erf"}),
    ],
    ids=["one rank", "ZeRO 3, recomputed", "two tensor ranks"],
)
def test_fused_and_reference_give_the_same_curve(ranks: int, parallel: dict[str, Any], model: dict[str, Any]) -> None:
    fused, reference = (
        curve_of(kernels, ranks=ranks, parallel=parallel, **model) for kernels in ("fused", "reference")
    )
    assert sorted(set(fused.seq_lens)) == [8, 16, 24, 32]
    assert fused.losses != reference.losses, "the same kernels ran twice"
    np.testing.assert_allclose(fused.losses, reference.losses, rtol=1e-5)
    np.testing.assert_allclose(fused.grad_norms, reference.grad_norms, rtol=1e-3)
    assert reference.losses[-1] < 0.97 * reference.losses[0]


def test_in_bf16_fused_kernels_stray_no_further_from_fp32_than_pytorch() -> None:
    exact = np.array(curve_of("reference", attention="fused_softmax").losses)
    fused, reference = (
        np.abs(np.array(curve_of(kernels, precision="bf16", attention="fused_softmax").losses) - exact)
        for kernels in ("fused", "reference")
    )
    assert fused.max() < 0.05 * exact.max()
    assert fused.mean() <= 1.5 * reference.mean()
