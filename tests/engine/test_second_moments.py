"""Which elements of Adam's second moment a rank counts, where no whole run reaches."""

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import LossScaleConfig, LossScaleProfile

from megatron_ext.engine.second_moments import own_second_moments
from megatron_ext.parallel.groups import Layout
from tests.ranks import single_rank

LAYERNORM, COLUMN = "decoder.layers.0.input_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.weight"


def place(*, tensor: tuple[int, int] = (0, 1), data: tuple[int, int] = (0, 1)) -> Layout:
    return Layout(*tensor, *data, tensor_group=None, data_group=None)  # type: ignore[arg-type]


def parameters() -> dict[str, torch.nn.Parameter]:
    return {LAYERNORM: torch.nn.Parameter(torch.ones(3)), COLUMN: torch.nn.Parameter(torch.ones(5, 3))}


def stepped() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    named = parameters()
    optimizer = torch.optim.AdamW(named.values(), betas=(0.9, 0.75))
    for parameter in named.values():
        parameter.grad = torch.arange(parameter.numel(), dtype=torch.float32).reshape(parameter.shape)
    optimizer.step()
    return named, optimizer


def test_copies_of_data_ranks_are_shared_out() -> None:
    named, optimizer = stepped()
    parts = [own_second_moments(optimizer, named.items(), place(data=(rank, 4))) for rank in range(4)]
    for name, parameter in named.items():
        pieces = [moment.values for part in parts for moment in part if moment.name == name]
        expected = 0.25 * torch.arange(parameter.numel(), dtype=torch.float32) ** 2
        assert torch.equal(torch.cat(pieces), expected)
    assert [moment.name for moment in parts[3]] == [COLUMN], "three elements leave nothing for the fourth rank"


def test_copies_of_tensor_ranks_are_counted_on_the_first() -> None:
    named, optimizer = stepped()
    parts = [own_second_moments(optimizer, named.items(), place(tensor=(rank, 2))) for rank in range(2)]
    assert [[moment.name for moment in part] for part in parts] == [[LAYERNORM, COLUMN], [COLUMN]]


def test_asking_before_the_first_step_changes_nothing() -> None:
    named = parameters()
    optimizer = torch.optim.AdamW(named.values())
    assert own_second_moments(optimizer, named.items(), place()) == []
    assert len(optimizer.state) == 0


def test_frozen_and_unused_parameters_have_no_part() -> None:
    named = parameters()
    named["position_embeddings.weight"] = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = torch.optim.AdamW(named.values())
    named[COLUMN].grad = torch.ones(5, 3)
    optimizer.step()
    assert [moment.name for moment in own_second_moments(optimizer, named.items(), place())] == [COLUMN]


def test_one_flat_master_copy_without_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """What DeepSpeed's fused Adam gets in half precision; torch's Adam here, which needs no GPU."""
    named = {name: torch.nn.Parameter(parameter.bfloat16()) for name, parameter in parameters().items()}
    scale = LossScaleConfig(
        low_precision_dtype=torch.bfloat16,
        dynamic_loss_scale=False,
        static_loss_scale=1.0,
        dynamic_loss_args=None,
        profile=LossScaleProfile.FUSED,
    )
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)  # else it is compiled
    with single_rank():
        deepspeed.comm.init_distributed(dist_init_required=False)
        adam = torch.optim.AdamW(named.values(), betas=(0.9, 0.75))
        optimizer = FP16_Optimizer(adam, loss_scale_config=scale, low_precision_dtype=torch.bfloat16)
        for value, parameter in enumerate(named.values(), start=1):
            parameter.grad = torch.full_like(parameter, float(value))
        optimizer.step()
    moments = own_second_moments(optimizer, named.items(), place())
    assert [(moment.name, moment.values.tolist()) for moment in moments] == [
        (LAYERNORM, [0.25] * 3),
        (COLUMN, [1.0] * 15),
    ]
