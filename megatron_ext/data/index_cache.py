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
import os
import shutil
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.runtime.files import publish_directory
from megatron_ext.runtime.log import LOGGER
from megatron_ext.runtime.run_lock import advisory_lock

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

        Where the directory cannot be written (a full disk) the arrays are in memory, which the log says. A damaged
        entry, by the checksums in its manifest, is built again and replaced, which the log says too.

        Args:
            key: what the entry follows from.
            build: makes it; a large one in another process, so it has to be picklable if it may be large.
            elements: how many numbers it will hold, about.

        Raises:
            UserError: there can be no such directory, or the process that builds was killed.
        """
        text = json.dumps(key, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        entry = self.directory / name
        try:
            if (arrays := _load(entry)) is not None:
                return arrays
            self.directory.mkdir(parents=True, exist_ok=True)
            with advisory_lock(
                self.directory / f"{name}.lock",
                what=f"the index {name}",
                say_after_seconds=min(self.patience_seconds, _SAY_AFTER_SECONDS),
                patience_seconds=self.patience_seconds,
            ):
                if (arrays := _load(entry)) is not None:
                    return arrays
                if entry.exists():
                    LOGGER.warning("index cache: %s is damaged or of an earlier version; it is built again", entry)
                self._remove_abandoned(name)
                self._write(entry, text, build, large=elements >= _LARGE)
            arrays = _load(entry)
        except OSError as error:
            from megatron_ext.data.index_apart import build_in_memory

            return build_in_memory(build, directory=self.directory, error=error, large=elements >= _LARGE)
        assert arrays is not None, f"{entry} was written and cannot be read"
        return arrays

    def _write(self, entry: Path, key: str, build: Build, *, large: bool) -> None:
        partial = self.directory / f"{entry.name}.partial-{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        partial.mkdir()
        try:
            if large:
                from megatron_ext.data.index_apart import call_apart

                sizes = call_apart(_save, build, partial, directory=self.directory)
            else:
                sizes = _save(build, partial)
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
