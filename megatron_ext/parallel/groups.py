"""Tensor- and data-parallel groups, made by megatron-core on an initialized torch.distributed."""

from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.curriculum.sampler import data_parallel_size


@dataclass(frozen=True)
class Layout:
    """Where this rank stands: ``tensor_size`` consecutive ranks hold one of ``data_size`` copies of the model."""

    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup


def initialize_parallel(tensor: int, timeout_minutes: float) -> Layout:
    """Make the groups of a run with ``tensor`` tensor-parallel ranks; collective, once per process.

    ``timeout_minutes`` is given to the new groups: the timeout of the default group does not reach them.

    Raises:
        UserError: the number of ranks is not divisible by ``tensor``.
    """
    assert dist.is_initialized(), "torch.distributed must be initialized first"
    world_size = dist.get_world_size()
    data_size = data_parallel_size(world_size, tensor=tensor)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    return Layout(
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_size=tensor,
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_size,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
    )


def destroy_parallel() -> None:
    """Forget megatron-core's groups; the default group stays for its owner to destroy."""
    parallel_state.destroy_model_parallel()
