"""Arrays computed once and kept on disk, keyed by the content they follow from.

Any process may build an entry: it is written into a directory of its own, synced, and renamed into place, so an entry
is whole or absent, whoever is killed when. Nodes with disks of their own each build their own. A lock only saves work:
processes that start together wait for the first of them. It is the kernel's lock on an open file, which ends with its
holder, so a killed builder stops nobody; where the file system has no locks, or the holder hangs, a process builds its
own copy, and whoever comes second to the rename throws its copy away.

A builder may keep Python's lock from its beginning to its end, as megatron-core's do: 11 s for the order of 10^8
documents were measured. No other thread runs meanwhile, also not the one that gives the other ranks a sign of life
(runtime/heartbeat.py). So a large entry is built by a process of its own.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.errors import UserError
from megatron_ext.runtime.files import publish_directory
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.run_lock import HeldError, file_lock
from megatron_ext.runtime.signals import stop_signals_blocked

Arrays = dict[str, npt.NDArray[Any]]
Build = Callable[[], Arrays]

_MANIFEST = "manifest.json"
_SAY_AFTER_SECONDS = 5.0
_PATIENCE_SECONDS = 600.0
_LARGE = 20_000_000
"""Elements from which on an entry is built by a process of its own, which takes seconds to start: about as long."""
_ABANDONED_SECONDS = 24 * 3600.0
_FOLDED = 4096


@dataclass(frozen=True)
class IndexCache:
    """A directory of entries, each a few ``.npy`` files."""

    directory: Path
    """Made when the first entry is written."""

    patience_seconds: float = _PATIENCE_SECONDS
    """How long to wait for another process that builds the same entry before building a copy beside it."""

    def get(self, key: Mapping[str, Any], build: Build, *, elements: int = 0) -> Arrays:
        """The entry of ``key`` (JSON values), memory-mapped and read-only; ``build`` makes it where it is missing.

        A damaged entry, by the checksums in its manifest, is built again and replaced, which the log says.

        Args:
            key: what the entry follows from.
            build: makes it; a large one in another process, so it has to be picklable if it may be large.
            elements: how many numbers it will hold, about.

        Raises:
            UserError: the directory cannot be written, or the process that builds was killed.
        """
        text = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        entry = self.directory / name
        try:
            if (arrays := _load(entry)) is not None:
                return arrays
            self.directory.mkdir(parents=True, exist_ok=True)
            with _locked(self.directory / f"{name}.lock", self.patience_seconds):
                if (arrays := _load(entry)) is not None:
                    return arrays
                if entry.exists():
                    LOGGER.warning("index cache: %s is damaged or of an earlier version; it is built again", entry)
                self._remove_abandoned(name)
                self._write(entry, text, build, large=elements >= _LARGE)
            arrays = _load(entry)
        except OSError as error:
            raise UserError(
                f"index cache {self.directory}: cannot be written ({error.strerror or error}); set data.index_cache to "
                "a directory on a disk with space that this user may write"
            ) from error
        assert arrays is not None, f"{entry} was written and cannot be read"
        return arrays

    def _write(self, entry: Path, key: str, build: Build, *, large: bool) -> None:
        partial = self.directory / f"{entry.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        try:
            sizes = _save_apart(build, partial) if large else _save(build, partial)
            sums = {name: _checksum(np.load(partial / f"{name}.npy", mmap_mode="r")) for name in sizes}
            manifest = json.dumps({"key": json.loads(key), "bytes": sizes, "checksums": sums}, indent=2)
            (partial / _MANIFEST).write_text(manifest, encoding="utf-8")
            publish_directory(partial, entry, keep=lambda there: _load(there) is not None)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _remove_abandoned(self, name: str) -> None:
        """Remove what killed builders left; only old ones, since a process elsewhere may be at work on a young one."""
        for partial in self.directory.glob(f"{name}.partial-*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > _ABANDONED_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)


def _save(build: Build, folder: Path) -> dict[str, int]:
    """Build the arrays and write them into a folder; the size of each file in bytes."""
    sizes = {}
    for name, array in build().items():
        with (folder / f"{name}.npy").open("wb") as file:
            np.save(file, array, allow_pickle=False)
            sizes[name] = file.tell()
    return sizes


def _save_apart(build: Build, folder: Path) -> dict[str, int]:
    """``_save`` by another process, which a signal to stop the run does not reach: the run stops when it is done."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        with stop_signals_blocked():  # inherited by the new process
            saved = pool.submit(_save, build, folder)
        try:
            return saved.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"index cache {folder.parent}: the process that built an entry was killed; the usual cause is too "
                "little memory on this host"
            ) from error


def _load(entry: Path) -> Arrays | None:
    """The arrays of a whole entry, else None."""
    try:
        manifest = json.loads((entry / _MANIFEST).read_text(encoding="utf-8"))
        sizes, sums = dict(manifest["bytes"]), manifest["checksums"]
        files = {name: entry / f"{name}.npy" for name in sizes}
        if any(files[name].stat().st_size != size for name, size in sizes.items()):
            return None
        # Plain arrays over the mapping: numpy's memmap class makes every access to a single element slow.
        arrays = {name: np.asarray(np.load(path, mmap_mode="r", allow_pickle=False)) for name, path in files.items()}
        return arrays if all(_checksum(array) == sums[name] for name, array in arrays.items()) else None
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except OSError:
        raise
    except Exception:  # what json and numpy raise for damaged files is of many kinds
        return None


def _checksum(array: npt.NDArray[Any]) -> str:
    """Of shape, type and content, at the speed of the memory: words are folded 512 to one, and the rest is hashed."""
    content = array.reshape(-1).view(np.uint8)
    whole = len(content) // _FOLDED * _FOLDED
    folded = np.bitwise_xor.reduce(content[:whole].view(np.uint64).reshape(-1, _FOLDED // 8), axis=1)
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    digest.update(folded.tobytes())
    digest.update(content[whole:].tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: Path, patience: float) -> Iterator[None]:
    """Hold an entry's lock, or go on without it after ``patience`` seconds or where locks are not supported."""
    first = min(patience, _SAY_AFTER_SECONDS)
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(HeldError, OSError):
            try:
                lock.enter_context(file_lock(path, wait_seconds=first))
            except HeldError as holder:
                LOGGER.info("waiting for the index %s, which another job builds (%s)", path.stem, holder)
                lock.enter_context(file_lock(path, wait_seconds=patience - first))
        yield
