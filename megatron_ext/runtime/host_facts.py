"""What a host says about itself before a run starts there; runs on the host, over ssh.

``python -m megatron_ext.runtime.host_facts '[FOLDER, PORT]'`` prints one JSON object. FOLDER is where the run is
started, PORT is one that has to be free, or null.
"""

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostFacts:
    """One host's answer."""

    addresses: dict[str, list[str]]
    """IPv4 addresses of each interface."""

    port: int | None
    """A port that nobody listens on: the one asked for, or any; None where the one asked for is taken."""

    cores: int
    """CPU cores that a process may use."""

    gpus: int
    """NVIDIA GPUs, as device files."""

    missing: list[str]
    """Paths, of those asked for, that do not exist here."""

    @property
    def reachable(self) -> list[str]:
        """Addresses at which others can reach the host, as far as can be seen from here."""
        return [address for name in self.addresses for address in self.addresses[name] if not is_local(address)]


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


def _examine(paths: list[str], port: int | None) -> HostFacts:
    missing = [path for path in paths if not Path(path).exists()]
    return HostFacts(
        addresses=host_addresses(),
        port=_free_port(port),
        cores=len(os.sched_getaffinity(0)),
        gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        missing=missing,
    )


def _free_port(wanted: int | None) -> int | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", wanted or 0))
        except OSError:
            return None
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    asked_paths, asked_port = json.loads(sys.argv[1])
    print(json.dumps(asdict(_examine(asked_paths, asked_port))))  # noqa: T201
