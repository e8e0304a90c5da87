"""The "model parallel unit": what DeepSpeed asks about the layout, under every name it has used for it.

DeepSpeed 0.19.8 calls the old names (get_model_parallel_*) in its ZeRO optimizers and the engine, the Megatron names
(get_tensor_model_parallel_*, get_pipeline_model_parallel_*) in checkpoints, and the ones of its own topology
(get_slice_parallel_*, get_pipe_parallel_*) elsewhere. megatron.core.parallel_state lacks the first and the last.
There are no sequence-parallel names on purpose: DeepSpeed takes their presence for Ulysses.
"""

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_ext.parallel.groups import Layout


class Mpu:
    """Answers for one rank; without pipeline stages, "model parallel" is tensor parallel."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pipeline_group: dist.ProcessGroup = parallel_state.get_pipeline_model_parallel_group()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank among those that share its copy of the model."""
        return self._layout.tensor_rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Ranks that share one copy of the model."""
        return self._layout.tensor_size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's copy of the model."""
        return self._layout.tensor_group

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self._layout.tensor_group, 0)

    def get_data_parallel_rank(self) -> int:
        """This rank among those that hold the same part of the model."""
        return self._layout.data_rank

    def get_data_parallel_world_size(self) -> int:
        """Copies of the model."""
        return self._layout.data_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part of the model."""
        return self._layout.data_group

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Their global ranks."""
        return dist.get_process_group_ranks(self._layout.data_group)

    def get_data_parallel_src_rank(self) -> int:
        """Global rank of the first of them."""
        return dist.get_global_rank(self._layout.data_group, 0)

    def get_pipeline_model_parallel_rank(self) -> int:
        """Always 0: one pipeline stage."""
        return 0

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Always 1: one pipeline stage."""
        return 1

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """A group of this rank alone."""
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
