"""The ranks of a run: who they are, on which hosts, and how they find each other (through runtime/store.py)."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import PrefixStore, Store

from megatron_ext.runtime.environment import RankInfo, job_attempt, use_interface
from megatron_ext.runtime.network import LOOPBACK

if TYPE_CHECKING:
    from megatron_ext.runtime.secret import SealedStore


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
    sealed: "SealedStore | None"
    """The same, for values that nobody else may have put there; None: there is one rank."""

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
        if self.sealed is None:
            return [value]
        from megatron_ext.runtime.store import gather

        waited = self.seconds if seconds is None else seconds
        names = [member.title for member in self.members]
        return gather(self.sealed, self.info, what, value, names=names, seconds=waited, stopped=lambda: False)


def join_rendezvous(
    info: RankInfo,
    *,
    seconds: float,
    interface: str | None = None,
    run_dir: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Rendezvous:
    """Find the other ranks, and make gloo and NCCL use the interface over which they are found.

    Args:
        info: this process.
        seconds: how long to wait for the others.
        interface: the interface to use; None: the one on the way to rank 0's host.
        run_dir: where ranks to which no launcher gave a secret share one.
        stopped: whether this process was asked to stop meanwhile.

    Raises:
        UserError: a rank did not come, the port is taken by another program, or there is no such interface here.
        SystemExit: another rank says what is wrong.
        StoppedEarlyError: ``stopped``.
    """
    if info.world_size == 1:
        # Nobody else needs a port.
        return Rendezvous(info, HashStore(), None, (_member(0, LOOPBACK),), seconds)
    from megatron_ext.runtime.secret import SealedStore, run_secret
    from megatron_ext.runtime.store import connect, expect, gather, interface_of, own_address

    deadline = time.monotonic() + seconds
    store = PrefixStore(f"attempt{job_attempt()}", connect(info, deadline, seconds, stopped))
    names = [f"rank {rank}" for rank in range(info.world_size)]
    with run_secret(info, store, run_dir, wait=lambda key: expect(store, key, deadline, stopped)) as secret:
        sealed = SealedStore(store, secret)
        address = own_address(info, sealed, interface, deadline, stopped)
        if info.on_one_host:
            use_interface(interface_of(address), nccl=False)
        else:
            use_interface(interface or interface_of(address))
        me, left = asdict(_member(info.rank, address)), max(1.0, deadline - time.monotonic())
        gathered = gather(sealed, info, "members", me, names=names, seconds=left, stopped=stopped)
    return Rendezvous(info, store, sealed, tuple(Member(**item) for item in gathered), seconds)


def _member(rank: int, address: str) -> Member:
    host, processes = socket.gethostname(), Path("/proc/self/ns/pid").readlink()
    machine = f"{host} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {processes}"
    return Member(rank, host, machine, os.getpid(), address)
