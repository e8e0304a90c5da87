"""The model under DeepSpeed's ZeRO stages and tensor parallelism: recomputation changes nothing there either."""

from typing import Any, get_args

import deepspeed
import pytest
import torch

from megatron_ext.model.gpt import Recomputation
from megatron_ext.model.parameters import parameter_groups
from megatron_ext.parallel.groups import Mpu, initialize_parallel
from tests.model.small import build_small, random_tokens
from tests.ranks import run_ranks


def _train(_rank: int, _world_size: int, stage: int, tensor: int, precision: str) -> dict[str, list[float]]:
    deepspeed.init_distributed(dist_backend="gloo")
    layout = initialize_parallel(tensor, 5.0)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    if precision != "fp32":
        settings[precision] = {"enabled": True}
    curves: dict[str, list[float]] = {}
    for recompute in get_args(Recomputation):
        model = build_small(layout, recompute=recompute, hidden_dropout=0.1, attention_dropout=0.1)
        optimizer = torch.optim.AdamW(parameter_groups(model.named_parameters(), 0.1), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, mpu=Mpu(layout), config=settings)
        curves[recompute] = []
        # Lengths change from step to step, as they do under a curriculum.
        for length in (8, 24, 40, 8):
            tokens = random_tokens(2, 40, seed=layout.data_rank)[:, :length]
            loss = engine(tokens, tokens).mean()
            engine.backward(loss)
            engine.step()
            curves[recompute].append(float(loss.detach()))
    return curves


@pytest.mark.parametrize(
    ("stage", "tensor", "precision"),
    [(0, 1, "fp32"), (1, 1, "fp32"), (2, 1, "fp32"), (3, 1, "fp32"), (1, 2, "fp32"), (3, 1, "bf16"), (2, 2, "bf16")],
)
def test_recomputation_gives_the_same_losses(stage: int, tensor: int, precision: str) -> None:
    for curves in run_ranks(_train, 2, stage, tensor, precision, timeout=180.0):
        assert curves["full"] == curves["none"]
        assert curves["none"][-1] < curves["none"][0]
