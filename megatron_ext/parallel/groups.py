"""Tensor- and data-parallel groups, made by megatron-core, and what DeepSpeed asks about them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.curriculum.sampler import data_parallel_size


@dataclass(frozen=True)
class Layout:
    """This rank's place: ``tensor_size`` consecutive ranks hold one of ``data_size`` copies of the model."""

    tensor_rank: int
    tensor_size: int
    data_rank: int
    data_size: int
    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup


def initialize_parallel(tensor: int, timeout_minutes: float) -> Layout:
    """Make the groups of a run with ``tensor`` tensor-parallel ranks; collective, once per process.

    ``timeout_minutes`` is given to the new groups: the timeout of the default group does not reach them. Raises
    UserError if the number of ranks is not divisible by ``tensor``.
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


@contextmanager
def single_rank_layout() -> Iterator[Layout]:
    """Groups of this process alone, for a model outside a run: in a test, a notebook, a benchmark.

    Needs neither a launcher nor variables, a port or a device: the store is in this process, and the gloo group of one
    rank never communicates. torch.distributed must not be initialized; afterwards it is not either.
    """
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield initialize_parallel(1, timeout_minutes=30.0)
    finally:
        destroy_parallel()
        dist.destroy_process_group()


class Mpu:
    """The "model parallel unit" of one rank: its place under every name that DeepSpeed has used for it.

    DeepSpeed 0.19.8 calls the old names (get_model_parallel_*) in its ZeRO optimizers and the engine, the Megatron
    names (get_tensor_model_parallel_*, get_pipeline_model_parallel_*) in checkpoints, and the ones of its own topology
    (get_slice_parallel_*, get_pipe_parallel_*) elsewhere. megatron.core.parallel_state lacks the first and the last.
    Without pipeline stages, "model parallel" is tensor parallel. There are no sequence-parallel names on purpose:
    DeepSpeed takes their presence for Ulysses.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pipeline_group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        return self._layout.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._layout.tensor_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.tensor_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self._layout.tensor_group, 0)

    def get_data_parallel_rank(self) -> int:
        return self._layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._layout.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._layout.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._layout.data_group)

    def get_data_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self._layout.data_group, 0)

    def get_pipeline_model_parallel_rank(self) -> int:
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        return 1

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._pipeline_group

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
    get_model_parallel_src_rank = get_tensor_model_parallel_src_rank
    get_slice_parallel_rank = get_tensor_model_parallel_rank
    get_slice_parallel_world_size = get_tensor_model_parallel_world_size
    get_slice_parallel_group = get_tensor_model_parallel_group
    get_pipe_parallel_rank = get_pipeline_model_parallel_rank
    get_pipe_parallel_world_size = get_pipeline_model_parallel_world_size
    get_pipe_parallel_group = get_pipeline_model_parallel_group
