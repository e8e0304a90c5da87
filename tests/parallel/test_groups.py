"""Layouts of real ranks, and the mpu: it answers everything that the installed DeepSpeed asks, and rightly."""

import re
from datetime import timedelta
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import bwc, groups

from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import Mpu, destroy_parallel, initialize_parallel, single_rank_layout
from tests.ranks import run_ranks, single_rank

_READ = ("runtime/*.py", "runtime/zero/*.py", "runtime/*checkpointing/*.py", "utils/groups.py", "utils/bwc.py")
# Asked only of an mpu that says it has sequence parallelism or auto tensor parallelism of DeepSpeed's own.
_NOT_OURS = re.compile(r"sequence|expert|_init_tp_mesh_device|zero_param|initialize")


def _describe(_rank: int, _world_size: int, tensor: int) -> tuple[list[int], list[int], list[int]]:
    layout = initialize_parallel(tensor, 5.0)
    place = [layout.tensor_rank, layout.tensor_size, layout.data_rank, layout.data_size]
    return place, dist.get_process_group_ranks(layout.tensor_group), dist.get_process_group_ranks(layout.data_group)


def test_tensor_ranks_are_neighbors() -> None:
    places = run_ranks(_describe, 4, 2)
    assert places == [
        ([0, 2, 0, 2], [0, 1], [0, 2]),
        ([1, 2, 0, 2], [0, 1], [1, 3]),
        ([0, 2, 1, 2], [2, 3], [0, 2]),
        ([1, 2, 1, 2], [2, 3], [1, 3]),
    ]


def _refused(_rank: int, _world_size: int) -> None:
    with pytest.raises(UserError, match=r"parallel\.tensor is 2.* 3 rank\(s\)"):
        initialize_parallel(2, 5.0)


def test_a_world_that_tensor_does_not_divide_is_refused() -> None:
    run_ranks(_refused, 3)


def test_the_timeout_reaches_the_groups_and_they_can_be_made_again() -> None:
    with single_rank():
        for minutes in (7.0, 0.5):
            layout = initialize_parallel(1, minutes)
            for group in (layout.tensor_group, layout.data_group):
                assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=minutes)
            destroy_parallel()


def test_a_process_alone_gets_a_layout_and_leaves_nothing_behind() -> None:
    for _ in range(2):
        with single_rank_layout() as layout:
            assert (layout.tensor_rank, layout.tensor_size, layout.data_rank, layout.data_size) == (0, 1, 0, 1)
        assert not dist.is_initialized()


def _asked() -> set[str]:
    root = Path(deepspeed.__file__).parent
    files = [file for pattern in _READ for file in root.glob(pattern)]
    assert len(files) > 30
    names = {name for file in files for name in re.findall(r"\bmpu\.(\w+)\(", file.read_text())}
    return {name for name in names if not _NOT_OURS.search(name)}


def test_every_name_deepspeed_calls_is_there_and_none_that_turns_ulysses_on() -> None:
    assert not [name for name in sorted(_asked()) if not callable(getattr(Mpu, name, None))]
    for name in ("initialize_sequence_parallel", "get_sequence_parallel_world_size"):
        assert not hasattr(Mpu, name)


def _answers(_rank: int, _world_size: int) -> list[object]:
    deepspeed.init_distributed(dist_backend="gloo")
    mpu = Mpu(initialize_parallel(2, 5.0))
    groups.mpu = mpu
    members = dist.get_process_group_ranks
    return [
        (bwc.bwc_tensor_model_parallel_rank(mpu), bwc.bwc_tensor_model_parallel_world_size(mpu)),
        members(bwc.bwc_tensor_model_parallel_group(mpu)),
        (mpu.get_model_parallel_rank(), groups._get_model_parallel_world_size()),
        bwc.bwc_pipeline_parallel_world_size(mpu),
        members(bwc.bwc_pipeline_parallel_group(mpu)),
        (groups._get_data_parallel_rank(), groups._get_data_parallel_world_size()),
        mpu.get_data_parallel_group_ranks(),
        (mpu.get_tensor_model_parallel_src_rank(), mpu.get_data_parallel_src_rank()),
        groups._get_broadcast_src_rank(),
    ]


def test_answers_of_rank_3_of_4() -> None:
    tensor, pipeline, data = [(1, 2), [2, 3], (1, 2)], [1, [3]], [(1, 2), [1, 3]]
    assert run_ranks(_answers, 4)[3] == [*tensor, *pipeline, *data, (2, 1), 1]
