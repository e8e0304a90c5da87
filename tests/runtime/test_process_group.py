"""Ranks agree, and what goes wrong at the rendezvous has one message."""

import socket
import time

import pytest
import torch
import torch.distributed as dist

from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.environment import RankInfo, rank_info
from megatron_ext.runtime.process_group import StopAgreement, process_group
from tests.ranks import run_ranks

CPU = Device(torch_device=torch.device("cpu"), backend="gloo", accelerator="cpu")


def agreement(rank: int, _world_size: int) -> tuple[list[bool], object, list[bool]]:
    with process_group(rank_info(), CPU, timeout_minutes=1.0) as processes:
        stopping = StopAgreement(processes)
        answers = []
        for step in range(3):
            stopping.ask(rank == 1 and step == 1)
            answers.append(stopping.answer())
        seen = processes.agree_from_main(f"from rank {rank}")
        first = [processes.first_to("speak"), processes.first_to("speak")]
        processes.barrier()
    assert not dist.is_initialized()
    return answers, seen, first


def test_ranks_agree() -> None:
    results = run_ranks(agreement, 2, init=False)
    for answers, seen, _ in results:
        assert answers == [False, True, False], "one rank's wish stops both, at its step and no other"
        assert seen == "from rank 0"
    assert sum(said for _, _, first in results for said in first) == 1


def late_question(rank: int, _world_size: int) -> bool:
    with process_group(rank_info(), CPU, timeout_minutes=1.0) as processes:
        if rank == 1:
            time.sleep(1.0)  # rank 0 has said it and is gone, and the store with it
        return processes.first_to("speak")


def test_a_rank_that_asks_when_rank_0_has_left_is_not_the_first() -> None:
    assert run_ranks(late_question, 2, init=False) == [True, False]


def failure(rank: int, _world_size: int) -> list[str]:
    said = []
    with process_group(rank_info(), CPU, timeout_minutes=1.0) as processes:
        for culprit in (2, 1, 0):
            try:
                with processes.failing_together():
                    if rank == culprit:
                        raise UserError(f"rank {rank} cannot")
                said.append("")
            except UserError as error:
                said.append(str(error))
    return said


def test_ranks_fail_together() -> None:
    assert run_ranks(failure, 2, init=False) == [["", "rank 1 cannot", "rank 0 cannot"]] * 2


def test_port_of_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        info = RankInfo(
            rank=0, local_rank=0, world_size=2, local_world_size=2, master_address="127.0.0.1", master_port=port
        )
        with (
            pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"),
            process_group(info, CPU, timeout_minutes=1.0),
        ):
            pytest.fail("joined a group on a foreign port")
