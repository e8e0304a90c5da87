"""The harness itself: results, failures, deaths and hangs of ranks are reported, and nothing is left running."""

import os
import sys
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankError, run_ranks, single_rank


def _sum_of_ranks(rank: int, world_size: int, factor: float) -> torch.Tensor:
    assert os.environ["RANK"] == str(rank)
    assert os.environ["WORLD_SIZE"] == str(world_size)
    value = torch.tensor([rank * factor])
    dist.all_reduce(value)
    return value


def _fail_on_one(rank: int, _world_size: int) -> None:
    sys.stdout.write("words before the failure\n")
    if rank == 1:
        raise RuntimeError("the reason")
    dist.barrier()


def _die(rank: int, _world_size: int) -> None:
    if rank == 0:
        os._exit(7)
    time.sleep(5)  # gloo tells the other rank of it at once, and the first to end is reported
    dist.barrier()


def _hang(rank: int, _world_size: int) -> None:
    if rank == 0:
        time.sleep(100)


def _no_group(_rank: int, _world_size: int) -> bool:
    return dist.is_initialized()


def test_results_come_back_in_the_order_of_ranks() -> None:
    results = run_ranks(_sum_of_ranks, 2, 3.0)
    assert [value.item() for value in results] == [3.0, 3.0]


def test_init_can_be_left_to_the_function() -> None:
    assert run_ranks(_no_group, 2, init=False) == [False, False]


def test_a_failing_rank_shows_its_traceback_and_output() -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*the reason.*words before the failure"):
        run_ranks(_fail_on_one, 2)


def test_a_dead_rank_is_reported_with_its_status() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit status 7"):
        run_ranks(_die, 2)


def test_a_hanging_rank_is_killed_at_the_deadline() -> None:
    start = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)\[0.*did not finish in 15 s.*_hang"):
        run_ranks(_hang, 2, timeout=15.0)
    assert time.monotonic() - start < 60


def test_single_rank_leaves_no_group_behind() -> None:
    with single_rank():
        assert dist.get_world_size() == 1
    assert not dist.is_initialized()
