"""The hosts of a run: a hostfile, and which of its hosts and slots are used.

The format is DeepSpeed's: ``NAME slots=N`` a line, ``#`` begins a comment. It is read here, because its own launcher
takes a file that is not there for a run on this machine.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import UserError

_LINE = re.compile(r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\s+slots=(?P<slots>[0-9]+)")
_CHOICE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(:(?P<slots>[0-9]+(,[0-9]+)*))?")
_MAX_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A host and the slots of it that are used: one rank each."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[Host]:
    """Hosts with all of their slots, in the order of the file.

    Raises:
        UserError: the file cannot be read, a line is wrong, a host is named twice, or there is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {path} cannot be read: {error}") from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.partition("#")[0].strip()
        if not stripped:
            continue
        match = _LINE.fullmatch(stripped)
        if match is None or not 0 < int(match["slots"]) <= _MAX_SLOTS:
            raise UserError(f"{path}:{number}: {stripped!r} is not of the form `NAME slots=N`, N at least 1")
        if match["name"] in hosts:
            raise UserError(f"{path}:{number}: host {match['name']} is named a second time; give it all its slots once")
        hosts[match["name"]] = Host(match["name"], tuple(range(int(match["slots"]))))
    if not hosts:
        raise UserError(f"{path} names no host; write one `NAME slots=N` a line")
    return list(hosts.values())


def choose_hosts(hosts: Iterable[Host], *, include: str = "", exclude: str = "") -> list[Host]:
    """The hosts and slots that ``--include`` or ``--exclude`` leaves, in the order of ``hosts``.

    Args:
        hosts: what the hostfile offers.
        include: ``NAME[:SLOT[,SLOT...]][@NAME...]``, as DeepSpeed writes it: these and no others.
        exclude: the same form: all but these.

    Raises:
        UserError: both are given, a part is malformed or names what is not there, or nothing is left.
    """
    hosts = list(hosts)
    if include and exclude:
        raise UserError("--include and --exclude exclude each other; give one of them")
    if not include and not exclude:
        return hosts
    option, text = ("--include", include) if include else ("--exclude", exclude)
    chosen = _parse_choice(option, text, {host.name: host for host in hosts})
    left = []
    for host in hosts:
        named = chosen.get(host.name, set())
        slots = tuple(slot for slot in host.slots if (slot in named) == bool(include))
        if slots:
            left.append(Host(host.name, slots))
    if not left:
        raise UserError(f"{option} {text} leaves no host to run on")
    return left


def _parse_choice(option: str, text: str, known: dict[str, Host]) -> dict[str, set[int]]:
    chosen: dict[str, set[int]] = {}
    for part in text.split("@"):
        match = _CHOICE.fullmatch(part)
        if match is None:
            raise UserError(f"{option} {text}: {part!r} is not of the form NAME or NAME:SLOT,SLOT")
        host = known.get(match["name"])
        if host is None:
            raise UserError(f"{option} {text}: the hostfile has no host {match['name']}; it has {', '.join(known)}")
        slots = {int(slot) for slot in match["slots"].split(",")} if match["slots"] else set(host.slots)
        if beyond := sorted(slots - set(host.slots)):
            raise UserError(
                f"{option} {text}: host {host.name} has no slot {beyond[0]}; it has 0 to {len(host.slots) - 1}"
            )
        chosen.setdefault(host.name, set()).update(slots)
    return chosen
