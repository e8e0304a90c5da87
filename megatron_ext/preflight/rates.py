"""How fast the ranks multiply and talk, measured for a moment before the run."""

import time
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device
from megatron_ext.runtime.meeting import Meeting, Member
from megatron_ext.runtime.process_group import Processes

_MATMUL_SECONDS = 0.2
_REPEATS = 3
_USUAL_SHARE_ON_GPUS = 0.7
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Rates:
    """What was measured."""

    tflops: list[float]
    """Matrix multiplication rate of each rank, 10^12 operations per second."""

    bandwidth: float
    """Bus bandwidth of an all-reduce over all ranks, 10^9 bytes per second; 0 for one rank."""


def check_rates(meeting: Meeting, config: RunConfig, processes: Processes, device: Device) -> Rates:
    """Measure on all ranks at once.

    Raises:
        UserError: on every rank, the rank that is too slow, or the slowest link of a network that is.
    """
    limits = config.cluster.preflight
    rates: list[float] = [0.0] * meeting.info.world_size
    dist.all_gather_object(rates, _matmul_tflops(config, device), group=processes.host_group)
    share = limits.min_matmul_share
    if share is None:
        share = _USUAL_SHARE_ON_GPUS if device.is_gpu else 0.0
    slowest = min(meeting.members, key=lambda member: rates[member.rank])
    if rates[slowest.rank] < share * max(rates):
        raise UserError(
            f"preflight: {slowest.title} multiplies matrices at {rates[slowest.rank]:.3g} TFLOP/s, the fastest rank at "
            f"{max(rates):.3g}; that is less than the share of {share:g} (cluster.preflight.min_matmul_share)"
        )
    size = limits.message_mib * 2**20
    bandwidth = _all_reduce_bandwidth(size, processes, device) if meeting.info.world_size > 1 else 0.0
    if 0 < bandwidth < limits.min_bandwidth_gb_per_second:
        raise UserError(
            f"preflight: the all-reduce runs at {bandwidth:.3g} GB/s, less than "
            f"cluster.preflight.min_bandwidth_gb_per_second {limits.min_bandwidth_gb_per_second:g}"
            f"{_slowest_link(meeting, processes, size)}"
        )
    return Rates(rates, bandwidth)


def _matmul_tflops(config: RunConfig, device: Device) -> float:
    size = 4096 if device.is_gpu else 384
    one = torch.ones(size, size, dtype=_DTYPES[config.training.precision], device=device.torch_device)
    best, end = float("inf"), time.perf_counter() + _MATMUL_SECONDS
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        float((one @ one)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def _all_reduce_bandwidth(size: int, processes: Processes, device: Device) -> float:
    """The same number on every rank: of the best repeat, as the slowest rank saw it."""
    message = torch.zeros(size // 4, dtype=torch.float32, device=device.torch_device)
    best = float("inf")
    for _ in range(_REPEATS + 1):  # the first one also makes the connections
        processes.barrier()
        start = time.perf_counter()
        dist.all_reduce(message)
        float(message[0])
        best = min(best, time.perf_counter() - start)
    slowest = torch.tensor([best], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=processes.host_group)
    world = processes.info.world_size
    return 2 * (world - 1) / world * size / float(slowest[0]) / 1e9


def _slowest_link(meeting: Meeting, processes: Processes, size: int) -> str:
    """Time a message over each link between neighboring hosts, one after another, and name the slowest."""
    leaders = meeting.leaders
    if len(leaders) == 1:
        return ""
    message = torch.zeros(size // 4, dtype=torch.float32)
    slowest: tuple[float, Member, Member] | None = None
    pairs = list(pairwise(leaders))
    for one, other in pairs + ([(leaders[-1], leaders[0])] if len(leaders) > 2 else []):
        processes.barrier()
        start = time.perf_counter()
        if meeting.me == one:
            dist.send(message, other.rank, group=processes.host_group)
        elif meeting.me == other:
            dist.recv(message, one.rank, group=processes.host_group)
        taken = [0.0] * meeting.info.world_size
        dist.all_gather_object(taken, time.perf_counter() - start, group=processes.host_group)
        if slowest is None or taken[other.rank] > slowest[0]:
            slowest = (taken[other.rank], one, other)
    assert slowest is not None
    seconds, one, other = slowest
    return f"; the slowest link is that between {one.host} and {other.host}, {size / seconds / 1e9:.3g} GB/s over gloo"
