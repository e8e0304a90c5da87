"""Preflight: whether every host is fit for the run, found out by its ranks before they train.

First without collectives: does each host see the run directory, have room in it, reach the next host, tell the same
time. Then with them: how fast the ranks multiply matrices and talk.
"""

import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ext.config.cluster import PreflightConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device, device_title
from megatron_ext.runtime.process_group import Processes
from megatron_ext.runtime.rendezvous import Member, Rendezvous

# How long a file may take to show up on another host: network file systems keep a folder's list for a while.
_SHOWS_UP_SECONDS = 5.0
_CONNECT_SECONDS = 5.0
_MATMUL_SECONDS = 0.2
_REPEATS = 3
_USUAL_SHARE_ON_GPUS = 0.7
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class RankReport:
    """What one rank says about its host."""

    device: str
    free_gib: float
    seconds: float  # its clock, right after all ranks have answered a question
    problem: str = ""  # what it found wrong by itself


class Preflight:
    """The examination of a run's hosts; every rank makes one."""

    def __init__(
        self, rendezvous: Rendezvous, limits: PreflightConfig, run_dir: Path, *, device: Device, precision: str
    ) -> None:
        """Ask all ranks what can be known before they are a group. Raises UserError, on all, with the unfit hosts."""
        self._rendezvous, self._limits, self._run_dir = rendezvous, limits, run_dir
        self._device, self._precision = device, precision
        self._started = time.perf_counter()
        self._reports = self._gather_reports()
        problems = list(self._problems())
        if problems:
            raise UserError("preflight: " + "; ".join(dict.fromkeys(problems)))

    def measure(self, processes: Processes) -> list[str]:
        """Measure; a line for each host, and one for all. Raises UserError, on all ranks, for a slow rank or link."""
        rates: list[Any] = processes.gather(self._matmul_tflops())
        self._check_matmul(rates)
        bandwidth = self._all_reduce_bandwidth(processes) if processes.info.world_size > 1 else 0.0
        if 0 < bandwidth < self._limits.min_bandwidth_gb_per_second:
            raise UserError(
                f"preflight: the all-reduce runs at {bandwidth:.3g} GB/s, less than "
                f"cluster.preflight.min_bandwidth_gb_per_second {self._limits.min_bandwidth_gb_per_second:g}"
                f"{self._slowest_link(processes)}"
            )
        return list(self._lines(rates, bandwidth))

    def _gather_reports(self) -> list[RankReport]:
        """Every rank's report, in the order of ranks, on every rank."""
        limit, rendezvous = self._limits.timeout_seconds, self._rendezvous
        # Another host connects to it; the kernel takes the connection without this process.
        family = socket.AF_INET6 if ":" in rendezvous.me.address else socket.AF_INET
        with socket.create_server((rendezvous.me.address, 0), family=family) as listener:
            asked = {"port": listener.getsockname()[1], "probe": ""}
            problem = ""
            if rendezvous.info.is_main:
                asked["probe"], problem = _write_probe(self._run_dir)
            answers: list[dict[str, Any]] = rendezvous.gather("preflight", asked, seconds=limit)
            try:
                if rendezvous.me in rendezvous.leaders and not problem:
                    problem = self._look(answers)
                rendezvous.gather("clock", 0, seconds=limit)
                own = RankReport(device_title(self._device), _free_gib(self._run_dir), time.time(), problem)
                gathered = rendezvous.gather("reports", asdict(own), seconds=limit)
            finally:
                if rendezvous.info.is_main and asked["probe"]:
                    with suppress(OSError):
                        (self._run_dir / str(asked["probe"])).unlink()
        return [RankReport(**item) for item in gathered]

    def _look(self, answers: list[dict[str, Any]]) -> str:
        """What this host finds wrong: of the file system that it should share, and of the way to the next host."""
        probe, run_dir, leaders = str(answers[0]["probe"]), self._run_dir, self._rendezvous.leaders
        if probe and not _shows_up(run_dir / probe, probe):
            first = self._rendezvous.members[0].host
            return (
                f"does not see what {first} wrote to {run_dir}; output_dir has to be on a file system that all hosts "
                "share"
            )
        own = run_dir / f"{probe}-{self._rendezvous.info.rank}"
        try:
            own.write_text(probe, encoding="ascii")
            own.unlink()
        except OSError as error:
            return f"cannot write to {run_dir} ({error})"
        following = leaders[(leaders.index(self._rendezvous.me) + 1) % len(leaders)]
        address = (following.address, int(answers[following.rank]["port"]))
        try:
            socket.create_connection(address, timeout=_CONNECT_SECONDS).close()
        except OSError as error:
            return (
                f"cannot connect to {following.host} at {address[0]}:{address[1]} ({error}); hosts of a run need all "
                "ports between them, see cluster.interface too"
            )
        return ""

    def _problems(self) -> Iterator[str]:
        """What is wrong with the hosts; the same on every rank."""
        limits, reports, members = self._limits, self._reports, self._rendezvous.members
        usual = Counter(report.device for report in reports).most_common(1)[0][0]
        for member, report in zip(members, reports, strict=True):
            host = f"host {member.host}"
            if report.problem:
                yield f"{host} {report.problem}"
            if report.device != usual:
                yield f"{host} has {report.device} for rank {member.rank}, while the others have {usual}"
            if report.free_gib < limits.min_free_gib:
                yield (
                    f"{host} has {report.free_gib:.2f} GiB free in {self._run_dir}, less than "
                    f"cluster.preflight.min_free_gib {limits.min_free_gib:g}"
                )
            skew = report.seconds - reports[0].seconds
            if abs(skew) > limits.max_clock_skew_seconds:
                yield (
                    f"the clock of {host} is {skew:+.1f} s off that of {members[0].host}, more than "
                    f"cluster.preflight.max_clock_skew_seconds {limits.max_clock_skew_seconds:g}"
                )

    def _check_matmul(self, rates: list[float]) -> None:
        share = self._limits.min_matmul_share
        if share is None:
            share = _USUAL_SHARE_ON_GPUS if self._device.is_gpu else 0.0
        slowest = min(self._rendezvous.members, key=lambda member: rates[member.rank])
        if rates[slowest.rank] < share * max(rates):
            raise UserError(
                f"preflight: {slowest.title} multiplies matrices at {rates[slowest.rank]:.3g} TFLOP/s, the fastest "
                f"rank at {max(rates):.3g}; that is less than the share of {share:g} "
                "(cluster.preflight.min_matmul_share)"
            )

    def _matmul_tflops(self) -> float:
        size = 4096 if self._device.is_gpu else 384
        one = torch.ones(size, size, dtype=_DTYPES[self._precision], device=self._device.torch_device)
        best, end = float("inf"), time.perf_counter() + _MATMUL_SECONDS
        while time.perf_counter() < end or best == float("inf"):
            start = time.perf_counter()
            float((one @ one)[0, 0])  # waits for the device
            best = min(best, time.perf_counter() - start)
        return 2 * size**3 / best / 1e12

    def _all_reduce_bandwidth(self, processes: Processes) -> float:
        """The same number on every rank: of the best repeat, as the slowest rank saw it."""
        size, world = self._limits.message_mib * 2**20, processes.info.world_size
        message = torch.zeros(size // 4, dtype=torch.float32, device=self._device.torch_device)
        best = float("inf")
        for _ in range(_REPEATS + 1):  # the first one also makes the connections
            processes.barrier()
            start = time.perf_counter()
            dist.all_reduce(message)
            float(message[0])
            best = min(best, time.perf_counter() - start)
        slowest = torch.tensor([best], dtype=torch.float64)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=processes.host_group)
        # A ring sends 2 (W - 1) / W of the message over each link.
        return 2 * (world - 1) / world * size / float(slowest[0]) / 1e9

    def _slowest_link(self, processes: Processes) -> str:
        """Time a message over each link between neighboring hosts, one after another, and name the slowest."""
        leaders, me = self._rendezvous.leaders, self._rendezvous.me
        if len(leaders) == 1:
            return ""
        size = self._limits.message_mib * 2**20
        message = torch.zeros(size // 4, dtype=torch.float32)
        slowest: tuple[float, Member, Member] | None = None
        pairs = list(pairwise(leaders))
        for one, other in pairs + ([(leaders[-1], leaders[0])] if len(leaders) > 2 else []):
            processes.barrier()
            start = time.perf_counter()
            if me == one:
                dist.send(message, other.rank, group=processes.host_group)
            elif me == other:
                dist.recv(message, one.rank, group=processes.host_group)
            taken: list[Any] = processes.gather(time.perf_counter() - start)
            if slowest is None or taken[other.rank] > slowest[0]:
                slowest = (taken[other.rank], one, other)
        assert slowest is not None
        seconds, one, other = slowest
        rate = size / seconds / 1e9
        return f"; the slowest link is that between {one.host} and {other.host}, {rate:.3g} GB/s over gloo"

    def _lines(self, tflops: list[float], bandwidth: float) -> Iterator[str]:
        """What was found, for people: each rank's matmul rate, and GB/s of the all-reduce (0 for one rank)."""
        leaders, members = self._rendezvous.leaders, self._rendezvous.members
        for leader in leaders:
            ranks = [member.rank for member in members if member.machine == leader.machine]
            report = self._reports[leader.rank]
            yield (
                f"{leader.host}: {len(ranks)} x {report.device}, {leader.address}, "
                f"matmul {min(tflops[rank] for rank in ranks):.3g} TFLOP/s a rank, "
                f"{report.free_gib:.1f} GiB free, clock {report.seconds - self._reports[0].seconds:+.2f} s"
            )
        seconds = time.perf_counter() - self._started
        reduced = f", all-reduce {bandwidth:.3g} GB/s" if bandwidth else ""
        yield f"preflight passed in {seconds:.1f} s: hosts {len(leaders)}, ranks {len(members)}{reduced}"


def _write_probe(run_dir: Path) -> tuple[str, str]:
    """Write the file that the other hosts look for; its name, and what was wrong."""
    name = f".preflight-{secrets.token_hex(8)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name, encoding="ascii")
    except OSError as error:
        return "", f"cannot write to {run_dir} ({error})"
    return name, ""


def _shows_up(path: Path, content: str) -> bool:
    deadline = time.monotonic() + _SHOWS_UP_SECONDS
    while time.monotonic() < deadline:
        with suppress(OSError):
            if path.read_text(encoding="ascii") == content:
                return True
        time.sleep(0.1)
    return False


def _free_gib(run_dir: Path) -> float:
    existing = next(path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free / 2**30
