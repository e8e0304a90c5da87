"""This machine's network: the addresses of its interfaces, and free ports."""

import socket

import psutil

LOOPBACK = "127.0.0.1"


def is_local(address: str) -> bool:
    """Whether an IPv4 or IPv6 address leads nowhere but to the machine itself, or to its own network segment."""
    return address.startswith(("127.", "169.254.", "fe80:")) or address in {"::1", "0.0.0.0", "::"}


def host_addresses(*, families: tuple[socket.AddressFamily, ...] = (socket.AF_INET,)) -> dict[str, list[str]]:
    """Addresses of each network interface that is up, with an IPv6 address's zone cut off."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        name: [entry.address.partition("%")[0] for entry in entries if entry.family in families]
        for name, entries in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: addresses for name, addresses in found.items() if addresses}


def listen(address: str, port: int = 0) -> socket.socket:
    """A socket that listens where ``address`` (a name or a number) leads on this machine, and nowhere else.

    Raises:
        OSError: it leads elsewhere, or the port is taken.
    """
    refused = OSError(f"{address} has no address")
    for family, _, _, _, place in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM):
        try:
            return socket.create_server(place, family=family, backlog=socket.SOMAXCONN)
        except OSError as error:
            refused = error
    raise refused


def free_port(wanted: int | None = None) -> int | None:
    """A TCP port that no program listens on at this moment: ``wanted``, or None where that is taken; else any."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted or 0))
        except OSError:
            return None
        return int(probe.getsockname()[1])
