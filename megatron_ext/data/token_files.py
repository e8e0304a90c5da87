"""Megatron's token file format: PREFIX.bin holds token ids, PREFIX.idx the documents' lengths; PREFIX.json is ours.

The layout is that of ``megatron.core.datasets.indexed_dataset``, byte for byte. It is written here and not through
``IndexedDatasetBuilder`` because tokenizing runs in processes that never import torch.
"""

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

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
SIDECAR_KIND = "megatron-ext tokens"


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

    bin_sha256: str | None = None
    """SHA-256 (hex) of PREFIX.bin, which ``megatron-ext data verify`` compares; earlier versions wrote none."""

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


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar at ``path``; None where there is none or the file is something else's."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("kind") != SIDECAR_KIND:
            return None
        types = get_type_hints(Sidecar)
        sidecar = Sidecar(**{name: value[name] for name in value if name in types})
        return sidecar if all(isinstance(getattr(sidecar, name), of) for name, of in types.items()) else None
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return None


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
