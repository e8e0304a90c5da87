"""Whether each host sees the run directory, has room in it, is reached by the others, and tells the same time."""

import secrets
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_ext.config.run import RunConfig
from megatron_ext.errors import UserError
from megatron_ext.runtime.device import Device, device_title
from megatron_ext.runtime.meeting import Meeting

_SHOWS_UP_SECONDS = 5.0
"""How long a file may take to show up on another host: network file systems keep a folder's list for a while."""

_CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class RankFacts:
    """What one rank says about its host."""

    device: str
    free_gib: float
    seconds: float
    """Its clock, when all ranks had just met."""

    problem: str = ""
    """What it found wrong by itself."""


def check_hosts(meeting: Meeting, config: RunConfig, device: Device) -> list[RankFacts]:
    """Ask all ranks at once, and judge the answers the same way on every rank.

    Returns:
        The facts, in the order of ranks.

    Raises:
        UserError: on every rank, the hosts that are not fit, and why.
    """
    limit = config.cluster.preflight.timeout_seconds
    is_leader = meeting.me in meeting.leaders
    with _listener(meeting) as listener:
        asked = {"port": listener.getsockname()[1], "probe": ""}
        problem = ""
        if meeting.info.is_main:
            asked["probe"], problem = _write_probe(config.run_dir)
        answers: list[dict[str, Any]] = meeting.gather("preflight", asked, seconds=limit)
        try:
            if is_leader and not problem:
                problem = _look(meeting, config.run_dir, answers)
            meeting.gather("clock", 0, seconds=limit)
            facts = RankFacts(device_title(device), _free_gib(config.run_dir), time.time(), problem)
            gathered = meeting.gather("facts", facts.__dict__, seconds=limit)
        finally:
            if meeting.info.is_main and asked["probe"]:
                with suppress(OSError):
                    (config.run_dir / str(asked["probe"])).unlink()
    all_facts = [RankFacts(**item) for item in gathered]
    problems = list(_problems(meeting, config, all_facts))
    if problems:
        raise UserError("preflight: " + "; ".join(dict.fromkeys(problems)))
    return all_facts


def _problems(meeting: Meeting, config: RunConfig, facts: list[RankFacts]) -> Iterator[str]:
    limits = config.cluster.preflight
    usual = Counter(fact.device for fact in facts).most_common(1)[0][0]
    for member, fact in zip(meeting.members, facts, strict=True):
        host = f"host {member.host}"
        if fact.problem:
            yield f"{host} {fact.problem}"
        if fact.device != usual:
            yield f"{host} has {fact.device} for rank {member.rank}, while the others have {usual}"
        if fact.free_gib < limits.min_free_gib:
            yield (
                f"{host} has {fact.free_gib:.2f} GiB free in {config.run_dir}, less than "
                f"cluster.preflight.min_free_gib {limits.min_free_gib:g}"
            )
        skew = fact.seconds - facts[0].seconds
        if abs(skew) > limits.max_clock_skew_seconds:
            yield (
                f"the clock of host {member.host} is {skew:+.1f} s off that of {meeting.members[0].host}, more than "
                f"cluster.preflight.max_clock_skew_seconds {limits.max_clock_skew_seconds:g}"
            )


def _listener(meeting: Meeting) -> socket.socket:
    """A socket to which another host connects; the kernel does so without this process."""
    family = socket.AF_INET6 if ":" in meeting.me.address else socket.AF_INET
    return socket.create_server((meeting.me.address, 0), family=family)


def _write_probe(run_dir: Path) -> tuple[str, str]:
    """Write the file that the other hosts look for; its name, and what was wrong."""
    name = f".preflight-{secrets.token_hex(8)}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(name, encoding="ascii")
    except OSError as error:
        return "", f"cannot write to {run_dir} ({error})"
    return name, ""


def _look(meeting: Meeting, run_dir: Path, answers: list[dict[str, Any]]) -> str:
    """What this host finds wrong: of the file system that it should share, and of the way to the next host."""
    probe = str(answers[0]["probe"])
    if probe and not _shows_up(run_dir / probe, probe):
        first = meeting.members[0].host
        return (
            f"does not see what {first} wrote to {run_dir}; output_dir has to be on a file system that all hosts share"
        )
    own = run_dir / f"{probe}-{meeting.info.rank}"
    try:
        own.write_text(probe, encoding="ascii")
        own.unlink()
    except OSError as error:
        return f"cannot write to {run_dir} ({error})"
    leaders = meeting.leaders
    following = leaders[(leaders.index(meeting.me) + 1) % len(leaders)]
    place = (following.address, int(answers[following.rank]["port"]))
    try:
        socket.create_connection(place, timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return (
            f"cannot connect to {following.host} at {place[0]}:{place[1]} ({error}); hosts of a run need all ports "
            "between them, see cluster.interface too"
        )
    return ""


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
