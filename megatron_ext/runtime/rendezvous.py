"""The rendezvous of a run's ranks: who they are, on which hosts, over which network interface they talk.

All of it goes through rank 0's store, before any collective, so that a rank that does not come can be named.
"""

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import RankInfo, agent_keeps_store, job_attempt, use_interface
from megatron_ext.runtime.network import host_addresses, is_local

_POLL_SECONDS = 0.2
_LATER = 15.0
"""Seconds that the others wait longer than rank 0, which knows why, and that it waits for them to have read it."""


class StoppedEarlyError(Exception):
    """This process was asked to stop before the rendezvous: there is nothing to save."""


@dataclass(frozen=True)
class Member:
    """A rank as the others know it."""

    rank: int
    host: str
    """The host's name."""

    machine: str
    """Equal for ranks that share a kernel and see each other's process ids."""

    pid: int
    address: str
    """Address at which other hosts reach this one; a loopback address where there is one host only."""

    @property
    def title(self) -> str:
        """The rank in a message."""
        return f"rank {self.rank} on host {self.host}"


@dataclass(frozen=True)
class Rendezvous:
    """The ranks of the run and the store that they share."""

    info: RankInfo
    store: Store
    members: tuple[Member, ...]
    seconds: float

    @property
    def me(self) -> Member:
        """This rank."""
        return self.members[self.info.rank]

    @property
    def leaders(self) -> list[Member]:
        """The first rank of each host, in the order of ranks."""
        first: dict[str, Member] = {}
        for member in self.members:
            first.setdefault(member.machine, member)
        return list(first.values())

    def gather(self, what: str, value: Any, *, seconds: float | None = None) -> list[Any]:
        """Every rank's ``value`` (of JSON), in the order of ranks, on every rank.

        Args:
            what: name of the question; each is asked once.
            value: this rank's answer.
            seconds: how long to wait for the others; by default as long as for the rendezvous.

        Raises:
            UserError: on rank 0, a rank did not answer; it is named.
            SystemExit: on the others, which rank 0 speaks for.
        """
        waited = self.seconds if seconds is None else seconds
        names = [member.title for member in self.members]
        return _gather(self.store, self.info, what, value, names=names, seconds=waited, stopped=lambda: False)


def join_rendezvous(
    info: RankInfo, *, seconds: float, interface: str | None = None, stopped: Callable[[], bool] = lambda: False
) -> Rendezvous:
    """Find the other ranks, and make gloo and NCCL use the interface over which they are found.

    Args:
        info: this process.
        seconds: how long to wait for the others.
        interface: the interface to use; None: the one on the way to rank 0's host.
        stopped: whether this process was asked to stop meanwhile.

    Raises:
        UserError: a rank did not come, the port is taken by another program, or there is no such interface here.
        SystemExit: another rank says what is wrong.
        StoppedEarlyError: ``stopped``.
    """
    deadline = time.monotonic() + seconds
    store = PrefixStore(f"attempt{job_attempt()}", _connect(info, deadline, seconds, stopped))
    address = _own_address(info, store, interface, deadline, stopped)
    if info.local_world_size < info.world_size:
        use_interface(interface or _interface_of(address))
    member = Member(info.rank, socket.gethostname(), _machine(), os.getpid(), address)
    names = [f"rank {rank}" for rank in range(info.world_size)]
    left = max(1.0, deadline - time.monotonic())
    gathered = _gather(store, info, "members", asdict(member), names=names, seconds=left, stopped=stopped)
    return Rendezvous(info, store, tuple(Member(**item) for item in gathered), seconds)


def _connect(info: RankInfo, deadline: float, seconds: float, stopped: Callable[[], bool]) -> Store:
    serves = info.is_main and not agent_keeps_store()
    where = f"{info.master_address}:{info.master_port}"
    while not serves:
        # torch would wait in a way that no signal ends.
        try:
            socket.create_connection((info.master_address, info.master_port), timeout=1.0).close()
            break
        except OSError as error:
            if stopped():
                raise StoppedEarlyError from None
            if time.monotonic() > deadline:
                raise UserError(
                    f"rank {info.rank} on host {socket.gethostname()} found no rank 0 at {where} within {seconds:.0f} "
                    f"s ({error}); see what rank 0 says, and whether a firewall is between the hosts"
                ) from error
            time.sleep(_POLL_SECONDS)
    try:
        return TCPStore(
            info.master_address,
            info.master_port,
            info.world_size,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(
                f"port {info.master_port} on {info.master_address} is in use by another program; "
                "choose another with --master-port, or leave the choice to `megatron-ext train`"
            ) from error
        raise UserError(f"rank {info.rank} cannot join the others at {where}: {error}") from error


def _own_address(
    info: RankInfo, store: Store, interface: str | None, deadline: float, stopped: Callable[[], bool]
) -> str:
    """Address of this host on the network that the run uses."""
    families = (socket.AF_INET, socket.AF_INET6)
    if interface is not None:
        addresses = host_addresses(families=families).get(interface)
        if not addresses:
            known = ", ".join(sorted(host_addresses(families=families)))
            raise UserError(
                f"cluster.interface is {interface}, but host {socket.gethostname()} has no such interface with an "
                f"address; it has {known}"
            )
        return addresses[0]
    address = _source_address(info.master_address, info.master_port)
    if info.local_world_size == info.world_size:
        return address
    if not is_local(address):
        store.set("elsewhere", address)
        return address
    # Rank 0's host, whose own name leads to itself (127.0.1.1 on Debian): the way to another host shows the interface.
    _wait(store, "elsewhere", deadline, stopped)
    return _source_address(store.get("elsewhere").decode(), info.master_port)


def _source_address(target: str, port: int) -> str:
    """Own address on the way to ``target``; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def _interface_of(address: str) -> str:
    found = host_addresses(families=(socket.AF_INET, socket.AF_INET6))
    for name, addresses in found.items():
        if address in addresses:
            return name
    raise UserError(f"no interface of host {socket.gethostname()} has the address {address}; set cluster.interface")


def _machine() -> str:
    processes = Path("/proc/self/ns/pid").readlink()
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {processes}"


def _gather(
    store: Store,
    info: RankInfo,
    what: str,
    value: Any,
    *,
    names: list[str],
    seconds: float,
    stopped: Callable[[], bool],
) -> list[Any]:
    store.set(f"{what}/{info.rank}", json.dumps(value))
    deadline = time.monotonic() + seconds
    if info.is_main:
        missing = []
        for rank, name in enumerate(names):
            try:
                _wait(store, f"{what}/{rank}", deadline, stopped)
            except TimeoutError:
                missing.append(name)
        if missing:
            store.set(what, json.dumps(None))
            shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
            raise UserError(
                f"{shown} did not answer within {seconds:.0f} s ({what}); see what they say, and whether a firewall is "
                "between the hosts"
            )
        values = [json.loads(store.get(f"{what}/{rank}")) for rank in range(len(names))]
        store.set(what, json.dumps(values))
        # The store ends with this process, which may have nothing more to do.
        until = time.monotonic() + _LATER
        while store.add(f"{what}/read", 0) < len(names) - 1 and time.monotonic() < until and not stopped():
            time.sleep(0.01)
        return values
    try:
        _wait(store, what, deadline + _LATER, stopped)
        values = json.loads(store.get(what))
        store.add(f"{what}/read", 1)
    except (TimeoutError, dist.DistError) as error:
        raise UserError(f"rank 0 was lost while rank {info.rank} waited for it ({what}): {error}") from error
    if values is None:
        raise SystemExit(2)
    assert isinstance(values, list)
    return values


def _wait(store: Store, key: str, deadline: float, stopped: Callable[[], bool]) -> None:
    """Return when ``key`` is there; TimeoutError after the deadline."""
    while not store.check([key]):
        if stopped():
            raise StoppedEarlyError
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {key}")
        time.sleep(0.02)
