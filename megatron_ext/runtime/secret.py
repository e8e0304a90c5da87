"""The secret of a run: what its ranks know and nobody else, and messages that prove who sent them.

A launcher hands it over in the ranks' environment, or in a file that only this user can read. Ranks that were started
by hand (torchrun, srun, mpirun) share a file of the run directory, mode 0600, while their rendezvous lasts. It never
lies in the store, where everybody may read and write, and never travels: what is sent carries an HMAC made with it.
"""

import hmac
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.distributed_c10d import Store

from megatron_ext.errors import UserError
from megatron_ext.runtime.environment import SECRET, RankInfo, launcher_secret

_SHORTEST = 16
_SHOWS_UP_SECONDS = 30.0
"""How long a new file may take to be seen on another host."""

_PROOF = 64
"""Bytes of an HMAC with SHA-256, in hexadecimal."""


@contextmanager
def run_secret(info: RankInfo, store: Store, run_dir: Path | None, wait: Callable[[str], None]) -> Iterator[bytes]:
    """Yield the run's secret; where a file holds it, rank 0 removes that when its block ends.

    Args:
        info: this process.
        store: in which rank 0 says whether there is a file, and which.
        run_dir: where the file may be; None: the environment has to hold the secret.
        wait: returns when the store has a key.

    Raises:
        UserError: the environment holds none and the file cannot be written or read, or is none of rank 0's.
    """
    given = launcher_secret()
    if given is not None and len(given) < _SHORTEST:
        raise UserError(f"{SECRET} has {len(given)} characters; give all ranks at least {_SHORTEST} random ones")
    if not info.is_main:
        wait("secret")
        name = store.get("secret").decode(errors="replace")
        if name != "given" and run_dir is not None:
            given = _read(run_dir, name)
    path = None
    if info.is_main and given is None and run_dir is not None:
        path, given = _write(run_dir)
    if given is None:
        raise UserError(f"{SECRET} is not set for rank {info.rank}; set it to the same for all ranks, or for none")
    if info.is_main:
        store.set("secret", "given" if path is None else path.name)
    try:
        yield given.encode()
    finally:
        if path is not None:
            with suppress(OSError):
                path.unlink()


def _write(run_dir: Path) -> tuple[Path, str]:
    path, text = run_dir / f".secret-{secrets.token_hex(8)}", secrets.token_hex(_PROOF // 2)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"the secret of the run cannot be written to {path}: {error}; see output_dir") from error
    return path, text


def _read(run_dir: Path, name: str) -> str:
    """What rank 0 has written, as soon as it is seen here; ``name`` may be anybody's."""
    deadline = time.monotonic() + _SHOWS_UP_SECONDS
    problem = "the store names no such file"
    while re.fullmatch(r"\.secret-[0-9a-f]{16}", name):
        try:
            text = (run_dir / name).read_text(errors="replace")
            if len(text) == _PROOF:
                return text
            problem = f"it has {len(text)} characters"
        except OSError as error:
            problem = str(error)
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    raise UserError(
        f"the secret that rank 0 has written into {run_dir} cannot be read on host {socket.gethostname()} ({problem}); "
        f"the ranks need a file system that all hosts share (output_dir), or {SECRET} set to the same for all of them"
    )


def seal(secret: bytes, context: str, body: bytes) -> bytes:
    """``body`` behind the proof that somebody with the secret said it, in this context."""
    return hmac.new(secret, context.encode() + b"\0" + body, "sha256").hexdigest().encode() + body


def unseal(secret: bytes, context: str, sealed: bytes) -> bytes:
    """The body of what ``seal`` has made, in the same context; ValueError for anything else."""
    body = sealed[_PROOF:]
    if not hmac.compare_digest(sealed, seal(secret, context, body)):
        raise ValueError("not sealed with the run's secret")
    return body


class SealedStore:
    """A store in which values count only if a rank of this run has put them there."""

    def __init__(self, store: Store, secret: bytes) -> None:
        self._store, self.secret = store, secret
        self.check, self.add = store.check, store.add

    def set(self, key: str, value: str) -> None:
        """Put a value there."""
        self._store.set(key, seal(self.secret, key, value.encode()).decode())

    def get(self, key: str) -> bytes:
        """Take a value from there; UserError where it is not from a rank of this run."""
        try:
            return unseal(self.secret, key, self._store.get(key))
        except ValueError as error:
            raise UserError(
                f"what the store at MASTER_PORT holds for {key} was not written by a rank of this run: another program "
                f"writes there, or {SECRET} is not the same for all ranks"
            ) from error
