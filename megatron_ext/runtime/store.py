"""Rank 0's store, through which the ranks of a run find each other: where it listens, who reaches it, what they ask.

All goes through it before any collective, so that a rank that does not come can be named.
"""

import errno
import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import Store

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import RankInfo, agent_keeps_store
from megatron_ext.runtime.network import LOOPBACK, host_addresses, is_local, listen
from megatron_ext.runtime.secret import SealedStore
from megatron_ext.runtime.signals import StoppedEarlyError

_POLL_SECONDS = 0.2
_LATER = 15.0
"""Seconds that the others wait longer than rank 0, which knows why, and that it waits for them to have read it."""


def _listening(info: RankInfo, host: str) -> int | None:
    """A socket for the store, open to those who reach rank 0 under its address only; None: torch's, open to all.

    Where a host's own name leads it to itself, or the address is not its own (127.0.1.1 on Debian, an address that is
    translated on the way), nothing here says over which interface the others come.
    """
    places = {str(entry[4][0]) for entry in socket.getaddrinfo(host, info.master_port)}
    if not info.on_one_host and any(map(is_local, places)):
        return None
    try:
        return listen(host, info.master_port).detach()
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return None
        raise


def connect(info: RankInfo, deadline: float, seconds: float, stopped: Callable[[], bool]) -> Store:
    """The store, served by rank 0.

    Raises:
        UserError: the port is taken by another program, or rank 0 is not found there.
        StoppedEarlyError: ``stopped``.
    """
    serves = info.is_main and not agent_keeps_store()
    host = LOOPBACK if info.on_one_host and not agent_keeps_store() else info.master_address
    where = f"{host}:{info.master_port}"
    while not serves:
        # torch would wait in a way that no signal ends.
        try:
            socket.create_connection((host, info.master_port), timeout=1.0).close()
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
            host,
            info.master_port,
            info.world_size,
            is_master=serves,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=_listening(info, host) if serves else None,
        )
    except (OSError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "in use" in str(error):
            raise UserError(
                f"port {info.master_port} on {host} is in use by another program; "
                "choose another with --master-port, or leave the choice to `megatron-ext train`"
            ) from error
        raise UserError(f"rank {info.rank} cannot join the others at {where}: {error}") from error


def own_address(
    info: RankInfo, store: SealedStore, interface: str | None, deadline: float, stopped: Callable[[], bool]
) -> str:
    """Address of this host on the network that the run uses."""
    known = host_addresses(families=(socket.AF_INET, socket.AF_INET6))
    if interface is not None and not known.get(interface):
        raise UserError(
            f"cluster.interface is {interface}, but host {socket.gethostname()} has no such interface with an address; "
            f"it has {', '.join(sorted(known))}"
        )
    if info.on_one_host:
        return LOOPBACK
    if interface is not None:
        return known[interface][0]
    address = _source_address(info.master_address, info.master_port)
    if not is_local(address):
        store.set("elsewhere", address)
        return address
    # Rank 0's host, whose own name leads to itself (127.0.1.1 on Debian): the way to another host shows the interface.
    expect(store, "elsewhere", deadline, stopped)
    return _source_address(store.get("elsewhere").decode(), info.master_port)


def _source_address(target: str, port: int) -> str:
    """Own address on the way to ``target``; nothing is sent."""
    family, kind, _, _, place = socket.getaddrinfo(target, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(place)
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The interface that has an address; UserError where none has."""
    found = host_addresses(families=(socket.AF_INET, socket.AF_INET6))
    for name, addresses in found.items():
        if address in addresses:
            return name
    raise UserError(f"no interface of host {socket.gethostname()} has the address {address}; set cluster.interface")


def gather(
    store: SealedStore,
    info: RankInfo,
    what: str,
    value: Any,
    *,
    names: list[str],
    seconds: float,
    stopped: Callable[[], bool],
) -> list[Any]:
    """Every rank's ``value``, as ``Rendezvous.gather`` says; a rank that did not answer is called by its name."""
    store.set(f"{what}/{info.rank}", json.dumps(value))
    deadline = time.monotonic() + seconds
    if info.is_main:
        missing = []
        for rank, name in enumerate(names):
            try:
                wait_for(store, f"{what}/{rank}", deadline, stopped)
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
        wait_for(store, what, deadline + _LATER, stopped)
        values = json.loads(store.get(what))
        store.add(f"{what}/read", 1)
    except (TimeoutError, dist.DistError) as error:
        raise UserError(f"rank 0 was lost while rank {info.rank} waited for it ({what}): {error}") from error
    if values is None:
        raise SystemExit(2)
    assert isinstance(values, list)
    return values


def expect(store: SealedStore | Store, key: str, deadline: float, stopped: Callable[[], bool]) -> None:
    """Return when ``key`` is there; UserError after the deadline."""
    try:
        wait_for(store, key, deadline, stopped)
    except (TimeoutError, dist.DistError) as error:
        raise UserError(f"the other ranks were waited for in vain or were lost ({key}): {error}") from error


def wait_for(store: SealedStore | Store, key: str, deadline: float, stopped: Callable[[], bool]) -> None:
    """Return when ``key`` is there; TimeoutError after the deadline."""
    while not store.check([key]):
        if stopped():
            raise StoppedEarlyError
        if time.monotonic() > deadline:
            raise TimeoutError(f"no {key}")
        time.sleep(0.02)
