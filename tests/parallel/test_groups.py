"""Layouts of real ranks."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.parallel.groups import destroy_parallel, initialize_parallel
from tests.ranks import run_ranks, single_rank


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


def _refused(_rank: int, _world_size: int) -> str:
    with pytest.raises(UserError) as error:
        initialize_parallel(2, 5.0)
    return str(error.value)


def test_a_world_that_tensor_does_not_divide_is_refused() -> None:
    for message in run_ranks(_refused, 3):
        assert "parallel.tensor is 2" in message
        assert "3 rank(s)" in message


def test_the_timeout_reaches_the_groups_and_they_can_be_made_again() -> None:
    with single_rank():
        for minutes in (7.0, 0.5):
            layout = initialize_parallel(1, minutes)
            for group in (layout.tensor_group, layout.data_group):
                assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(minutes=minutes)
            destroy_parallel()
