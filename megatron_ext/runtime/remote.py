"""One command on many hosts at once, over ssh, with a time limit."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CONNECT_SECONDS = 5
SSH_OPTIONS = (
    *("-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_SECONDS}"),
    # A connection over a cut link ends by itself: after 15 s without an answer.
    *("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3"),
)
PACKAGE_ROOT = Path(__file__).parents[2]
_AT_ONCE = 64


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


def ask_hosts(hosts: Iterable[str], module: str, arguments: Iterable[object], *, seconds: float) -> list[Answer]:
    """Run a module of this package, with this interpreter's path, on every host at once.

    Args:
        hosts: names that ssh knows.
        module: dotted name; it prints its answer.
        arguments: JSON values, which the module gets as one JSON list.
        seconds: for all of it.

    Returns:
        An answer for each host, in the order of ``hosts``.
    """
    words = ["env", f"PYTHONPATH={PACKAGE_ROOT}", sys.executable, "-m", module, json.dumps(list(arguments))]
    command = shlex.join(words)

    def ask(host: str) -> Answer:
        try:
            done = subprocess.run(
                ["ssh", *SSH_OPTIONS, host, command],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(host, None, "", "")
        return Answer(host, done.returncode, done.stdout, done.stderr)

    names = list(hosts)
    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(names))) as pool:
        return list(pool.map(ask, names))
