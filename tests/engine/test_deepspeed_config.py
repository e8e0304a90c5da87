"""DeepSpeed's dictionary as a function of the engine's settings, without DeepSpeed."""

import copy
from itertools import product
from typing import Any

import pytest

from megatron_ext.config.model import ParallelConfig
from megatron_ext.config.training import OptimizerConfig
from megatron_ext.engine.deepspeed_config import EngineSettings, clips_outside_engine, deepspeed_config


def settings(**values: Any) -> EngineSettings:
    parallel = ParallelConfig.model_validate(values.pop("parallel", {}))
    optimizer = OptimizerConfig.model_validate(values.pop("optimizer", {}))
    return EngineSettings(optimizer=optimizer, parallel=parallel, **values)


def dictionary(**values: Any) -> dict[str, Any]:
    return deepspeed_config(settings(**values), data_size=4)


@pytest.mark.parametrize(("stage", "precision"), list(product((0, 1, 2, 3), ("fp32", "bf16", "fp16"))))
def test_the_boundary_is_ours_on_every_stage_and_precision(stage: int, precision: str) -> None:
    found = dictionary(parallel={"zero_stage": stage}, precision=precision)
    assert found["managed_gradient_accumulation"] is False
    assert found["gradient_accumulation_steps"] == 1
    # DeepSpeed wants its batch sizes to agree: global = micro * accumulation * data-parallel ranks.
    assert found["train_batch_size"] == 4 * found["train_micro_batch_size_per_gpu"]
    assert found["zero_optimization"]["stage"] == stage
    assert {"fp16", "bf16"} & found.keys() == ({precision} - {"fp32"})
    # Partitioned gradients may be reduced while later ones are accumulated; others may not.
    assert found["zero_optimization"].get("overlap_comm", False) == (stage >= 2)
    # Sums over micro-batches keep float32 wherever DeepSpeed can.
    assert found.get("data_types", {}).get("grad_accum_dtype") == ("fp32" if stage and precision != "fp32" else None)


@pytest.mark.parametrize(("stage", "precision"), list(product((0, 1, 2, 3), ("fp32", "bf16", "fp16"))))
def test_gradients_are_clipped_in_one_place(stage: int, precision: str) -> None:
    values = settings(parallel={"zero_stage": stage}, precision=precision, optimizer={"clip_grad": 0.7})
    ours = clips_outside_engine(values)
    assert ours == (stage == 0 and precision == "fp32")
    assert deepspeed_config(values, data_size=1)["gradient_clipping"] == (0.0 if ours else 0.7)


def test_adam_has_the_settings_of_the_section() -> None:
    found = dictionary(optimizer={"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.2}, lr=0.5)["optimizer"]
    assert found["type"] == "AdamW"
    assert found["params"] == {
        "lr": 0.5,
        "betas": [0.8, 0.9],
        "eps": 1e-6,
        "weight_decay": 0.2,
        "torch_adam": True,
        "fused": True,
    }


@pytest.mark.parametrize(
    ("implementation", "offload", "by_torch"),
    [
        ("auto", "none", True),
        ("torch", "none", True),
        ("auto", "cpu", False),  # an offloaded optimizer steps on the CPU, by DeepSpeed's CPUAdam
        ("deepspeed_cpu", "cpu", False),
        ("deepspeed_fused", "none", False),
    ],
)
def test_which_adam_computes(implementation: str, offload: str, by_torch: bool) -> None:
    parallel = {"zero_stage": 2, "offload_optimizer": offload}
    found = dictionary(optimizer={"implementation": implementation}, parallel=parallel)
    assert found["optimizer"]["params"].get("torch_adam", False) == by_torch
    assert found["zero_optimization"].get("offload_optimizer") == ({"device": "cpu"} if offload == "cpu" else None)


def test_parameters_are_offloaded_and_not_gathered_on_stage_3() -> None:
    found = dictionary(parallel={"zero_stage": 3, "offload_params": "cpu"})["zero_optimization"]
    assert found["offload_param"] == {"device": "cpu"}
    assert found["stage3_gather_16bit_weights_on_model_save"] is False


def test_the_users_keys_win_and_leave_their_neighbors_and_themselves_alone() -> None:
    given = {"zero_optimization": {"reduce_bucket_size": 7, "overlap_comm": False}, "wall_clock_breakdown": True}
    kept = copy.deepcopy(given)
    found = dictionary(parallel={"zero_stage": 2}, deepspeed=given)
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 7}
    assert found["wall_clock_breakdown"] is True
    assert given == kept


def test_fp16_scales_its_loss_dynamically() -> None:
    assert dictionary(precision="fp16")["fp16"]["loss_scale"] == 0
