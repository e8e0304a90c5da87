"""The hosts of a run: which they are, what each has to offer, and signals to what runs there.

``python -m megatron_ext.launch.hosts QUESTION '[ARGUMENT, ...]'`` answers on a host over ssh what this machine answers
by a call, so that this machine is a cluster of one host. A hostfile has DeepSpeed's format: ``NAME slots=N`` a line,
``#`` begins a comment. It is read here, because its own launcher takes a file that is not there for a run on this
machine.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_ext.errors import UserError
from megatron_ext.runtime.network import free_port, host_addresses, is_local

JOB = "MEGATRON_EXT_JOB"
"""Variable with the id of the job, which every process of it has on every host."""

WORKER = "megatron_ext.worker"
PACKAGE_ROOT = Path(__file__).parents[2]
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=5"),
    # A connection over a cut link ends by itself: after 15 s without an answer.
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
NO_WAY = 255
"""Exit status of ssh where it does not reach the host."""

_SIGNAL_SECONDS = 15.0
_AT_ONCE = 64

_LINE = re.compile(r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)\s+slots=(?P<slots>[0-9]+)")
_CHOICE = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(:(?P<slots>[0-9]+(,[0-9]+)*))?")
_MAX_SLOTS = 1024


@dataclass(frozen=True)
class Host:
    """A host and the slots of it that are used: one rank each."""

    name: str
    slots: tuple[int, ...]


def read_hostfile(path: Path) -> list[Host]:
    """Hosts with all of their slots, in the order of the file. Raises UserError if it cannot be read or used."""
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

    Both have DeepSpeed's form, ``NAME[:SLOT[,SLOT...]][@NAME...]``: these and no others, or all but these. Raises
    UserError if both are given, a part is malformed or names what is not there, or nothing is left.
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


@dataclass(frozen=True)
class HostReport:
    """What a host says about itself before a run starts there."""

    addresses: dict[str, list[str]]  # IPv4 addresses of each interface
    # A port that nobody listens on: the one asked for, or any; None where the one asked for is taken.
    port: int | None
    cores: int  # CPU cores that a process may use
    gpus: int  # NVIDIA GPUs, as device files
    missing: list[str]  # paths, of those asked for, that do not exist here

    @property
    def reachable(self) -> list[str]:
        """Addresses at which others can reach the host, as far as can be seen from here."""
        return [address for name in self.addresses for address in self.addresses[name] if not is_local(address)]


def report(paths: list[str], port: int | None) -> HostReport:
    """This machine's report: on ``paths`` that have to exist, and a ``port`` that has to be free (None: any)."""
    return HostReport(
        addresses=host_addresses(),
        port=free_port(port),
        cores=len(os.sched_getaffinity(0)),
        gpus=len(list(Path("/dev").glob("nvidia[0-9]*"))),
        missing=[path for path in paths if not Path(path).exists()],
    )


def signal_job(job: str, number: int) -> int:
    """Send a signal to the job's processes on this machine and return to how many it went.

    SIGKILL goes to all of them; any other signal to the ranks alone, which know what to do with it.
    """
    reached = 0
    for pid in _processes_of(job):
        if number != signal.SIGKILL and not _is_rank(pid):
            continue
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)
            reached += 1
    return reached


def signal_job_on(hosts: list[str], job: str, number: int) -> int:
    """The same on all hosts; without one on this machine."""
    if not hosts:
        return signal_job(job, number)
    answers = ask_hosts(hosts, "signal", [job, number], seconds=_SIGNAL_SECONDS)
    return sum(json.loads(answer.out) for answer in answers if answer.status == 0)


def _processes_of(job: str) -> Iterator[int]:
    mark = f"{JOB}={job}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)


def _is_rank(pid: int) -> bool:
    with suppress(OSError):
        # The launcher's own processes carry the worker's name in their arguments too.
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        return WORKER in words and not any("deepspeed" in word for word in words[: words.index(WORKER)])
    return False


@dataclass(frozen=True)
class Answer:
    """What a host said. ``status`` is ssh's 255 where there was no way to it, and None where the time ran out."""

    host: str
    status: int | None
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of its errors."""
        lines = self.err.strip().splitlines()
        return lines[-1].strip() if lines else ""


def ask_hosts(hosts: list[str], question: str, arguments: list[object], *, seconds: float) -> list[Answer]:
    """Ask every host at once, over ssh and with this interpreter's path; an answer for each, in the order of ``hosts``.

    The question is "report" or "signal", its arguments are JSON values, and ``seconds`` is for all of it.
    """
    words = ["env", f"PYTHONPATH={PACKAGE_ROOT}", sys.executable, "-m", "megatron_ext.launch.hosts"]
    command = shlex.join([*words, question, json.dumps(arguments)])

    def ask(host: str) -> Answer:
        ssh = ["ssh", *SSH_OPTIONS, host, command]
        try:
            done = subprocess.run(
                ssh, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired:
            return Answer(host, None, "", "")
        return Answer(host, done.returncode, done.stdout, done.stderr)

    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(hosts))) as pool:
        return list(pool.map(ask, hosts))


if __name__ == "__main__":
    asked, given = sys.argv[1], json.loads(sys.argv[2])
    print(json.dumps(asdict(report(*given)) if asked == "report" else signal_job(*given)))  # noqa: T201
