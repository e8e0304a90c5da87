"""Ranks agree, and what goes wrong at the rendezvous has one message."""

import socket

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


def test_port_of_another_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        info = RankInfo(
            rank=0, local_rank=0, world_size=1, local_world_size=1, master_address="127.0.0.1", master_port=port
        )
        with (
            pytest.raises(UserError, match=f"port {port} on 127.0.0.1 is in use"),
            process_group(info, CPU, timeout_minutes=1.0),
        ):
            pytest.fail("joined a group on a foreign port")
