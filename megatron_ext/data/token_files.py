"""Megatron's token file format: PREFIX.bin holds token ids, PREFIX.idx the documents' lengths; PREFIX.json is ours.

The layout is that of ``megatron.core.datasets.indexed_dataset``, byte for byte. It is written here and not through
``IndexedDatasetBuilder`` because tokenizing runs in processes that never import torch.
"""

import hashlib
import json
import os
import struct
from array import array
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from megatron_ext.runtime.files import sync

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPES: dict[int, type[np.number[Any]]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}
SIDECAR_KIND = "megatron-ext tokens"

_UINT16_BELOW = 65500  # Megatron's own bound (DType.optimal_dtype), kept so that files come out identical


@dataclass(frozen=True)
class Sidecar:
    """PREFIX.json: what PREFIX.bin was made with. Files made by Megatron's own tools have none."""

    tokenizer: str
    """Name or path that was given; for messages."""

    tokenizer_digest: str
    """:attr:`megatron_ext.data.tokenizers.Tokenizer.digest`."""

    vocab_size: int
    """Ids the tokenizer can produce."""

    eod: int | None
    """Id written after every document; None where none was."""

    documents: int
    """Documents in the file."""

    tokens: int
    """Token ids in the file, separators included."""

    max_token: int
    """Largest id in the file."""

    idx_sha256: str
    """SHA-256 (hex) of PREFIX.idx, by which a sidecar of other files is recognized."""

    kind: str = SIDECAR_KIND
    """Marks the file as ours."""


@dataclass(frozen=True)
class TokenPaths:
    """The three files of a prefix."""

    bin: Path
    """Token ids."""

    idx: Path
    """Lengths, positions and document boundaries."""

    sidecar: Path
    """What the tokens were made with."""

    @classmethod
    def of(cls, prefix: str | Path) -> "TokenPaths":
        """Paths for ``prefix``; suffixes are added, never replaced, so that ``data.v1`` stays what it is."""
        return cls(bin=Path(f"{prefix}.bin"), idx=Path(f"{prefix}.idx"), sidecar=Path(f"{prefix}.json"))


def token_dtype(vocab_size: int) -> type[np.number[Any]]:
    """uint16 or int32, as Megatron chooses it."""
    return np.uint16 if vocab_size < _UINT16_BELOW else np.int32


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar at ``path``; None where there is none or the file is something else's."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("kind") != SIDECAR_KIND:
            return None
        return Sidecar(**value)
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TokenFileWriter:
    """Writes the three files aside; :meth:`commit` gives them their names. Leaving the context without it removes them.

    Memory grows by 4 bytes a document.
    """

    def __init__(self, prefix: Path, *, dtype: type[np.number[Any]]) -> None:
        self._final = TokenPaths.of(prefix)
        self._partial = TokenPaths.of(prefix.with_name(f".{prefix.name}.partial-{os.getpid()}"))
        self._dtype = np.dtype(dtype)
        self._lengths = array("i")
        self._file: IO[bytes]
        self.tokens = 0
        self.max_token = -1

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return len(self._lengths)

    def __enter__(self) -> Self:
        self._partial.bin.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._partial.bin.open("wb")
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
        self._file.write(tokens.astype(self._dtype).tobytes())
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
            code = DTYPE_CODES[self._dtype.type]
            file.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            file.write(lengths.tobytes())
            file.write(positions.tobytes())
            file.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
