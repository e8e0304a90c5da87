"""Writing token files: aside first, so that they are whole or not there."""

import fcntl
import hashlib
import json
import os
import re
from array import array
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_ext.data.token_files import DTYPES, HEADER, MAGIC, Sidecar, TokenPaths, file_sha256
from megatron_ext.runtime.files import sync
from megatron_ext.runtime.run_lock import is_held

_DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
_UINT16_BELOW = 65500  # Megatron's own bound (DType.optimal_dtype), kept so that files come out identical


def token_dtype(vocab_size: int) -> type[np.number[Any]]:
    """uint16 or int32, as Megatron chooses it."""
    return np.uint16 if vocab_size < _UINT16_BELOW else np.int32


class TokenFileWriter:
    """Writes the three files aside; :meth:`commit` gives them their names. Leaving the context without it removes them.

    Memory grows by 4 bytes a document.
    """

    def __init__(self, prefix: Path, *, dtype: type[np.number[Any]]) -> None:
        self._prefix, self._final = prefix, TokenPaths.of(prefix)
        self._partial = TokenPaths.of(prefix.with_name(f".{prefix.name}.partial-{os.getpid()}"))
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._file: IO[bytes]
        self._sha256 = hashlib.sha256()
        self.tokens = 0
        self.max_token = -1

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        self._partial.bin.parent.mkdir(parents=True, exist_ok=True)
        remove_left(self._prefix)
        self._file = self._partial.bin.open("wb")
        # By the lock other hosts see that this process lives; where the file system has none, its number has to do.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()  # writes what is buffered, and fails again where the disk is full
        finally:
            for path in (self._partial.bin, self._partial.idx, self._partial.sidecar):
                path.unlink(missing_ok=True)

    def add(self, tokens: npt.NDArray[np.integer[Any]], lengths: npt.NDArray[np.integer[Any]]) -> None:
        """Append documents: their ids one after the other [sum(lengths)], and how many each has [documents]."""
        if not len(lengths):
            return
        assert int(lengths.sum()) == len(tokens)
        assert int(lengths.min()) > 0
        self.max_token = max(self.max_token, int(tokens.max()))
        assert self.max_token <= np.iinfo(self._dtype).max
        data = tokens.astype(self._dtype).data
        self._file.write(data)
        self._sha256.update(data)
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self.tokens += len(tokens)

    def commit(self, *, tokenizer: str, tokenizer_digest: str, vocab_size: int, eod: int | None) -> Sidecar:
        """Finish the files and give them their names, .idx last: without it nothing reads the others."""
        self._file.flush()
        self._write_index()
        sidecar = Sidecar(
            tokenizer=tokenizer,
            tokenizer_digest=tokenizer_digest,
            vocab_size=vocab_size,
            eod=eod,
            documents=self.documents,
            tokens=self.tokens,
            max_token=self.max_token,
            idx_sha256=file_sha256(self._partial.idx),
            bin_sha256=self._sha256.hexdigest(),
        )
        self._partial.sidecar.write_text(json.dumps(asdict(sidecar), indent=2) + "\n", encoding="utf-8")
        for path in (self._partial.bin, self._partial.idx, self._partial.sidecar):
            sync(path)
        self._final.idx.unlink(missing_ok=True)
        self._partial.bin.replace(self._final.bin)
        self._partial.sidecar.replace(self._final.sidecar)
        self._partial.idx.replace(self._final.idx)
        return sidecar

    def _write_index(self) -> None:
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        positions = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1], dtype=np.int64, out=positions[1:])
        positions *= self._dtype.itemsize
        with self._partial.idx.open("wb") as file:
            code = _DTYPE_CODES[self._dtype.type]
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(positions.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())


def remove_left(prefix: Path) -> None:
    """Remove what writers of ``prefix`` left that were killed; of one that lives nothing is touched."""
    for path in prefix.parent.glob(".*"):
        found = re.fullmatch(rf"\.{re.escape(prefix.name)}\.partial-(\d{{1,9}})\.(bin|idx|json)", path.name)
        if found and not _lives(int(found[1])) and not is_held(path.with_suffix(".bin")):
            with suppress(OSError):
                path.unlink()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # another user's
    return True
