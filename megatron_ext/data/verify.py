"""Token files read from end to end: what their ids are, whether they are those that were written, which one is wrong."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from megatron_ext.data.index_cache import Arrays, IndexCache
from megatron_ext.data.sources import TokenSource, open_source
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.data.datasets import Samples

_BLOCK_BYTES = 1 << 24


@dataclass(frozen=True)
class Verified:
    """What is known of token files that were found right."""

    documents: int
    tokens: int

    ids: tuple[int, int]
    """Smallest and largest id."""

    against: tuple[str, ...]
    """What they were compared with; nothing for the files of another tool, which say nothing of themselves."""


def verify(prefix: str) -> Verified:
    """Read PREFIX.bin from end to end and compare it with what PREFIX.idx and PREFIX.json say.

    Raises:
        UserError: the files are not whole, or not those that were written.
    """
    source = open_source(prefix)
    path, sidecar, digest = f"{prefix}.bin", source.sidecar, hashlib.sha256()
    low, high = _range(_blocks(source, digest))
    again = "fetch the file or run megatron-ext preprocess again"
    if low < 0:
        raise UserError(f"{path}: damaged, it holds the negative token id {low}; {again}")
    if sidecar is None:
        return Verified(source.documents, source.tokens, (low, high), ())
    if (sidecar.documents, sidecar.tokens) != (source.documents, source.tokens):
        raise UserError(
            f"{prefix}.json: damaged, it tells of {sidecar.documents:,} documents with {sidecar.tokens:,} tokens, and "
            f"{prefix}.idx of {source.documents:,} with {source.tokens:,}; {again}"
        )
    if high != sidecar.max_token or high >= sidecar.vocab_size:
        raise UserError(
            f"{path}: damaged, its largest token id is {high} where {prefix}.json says {sidecar.max_token} (of "
            f"{sidecar.vocab_size:,} ids); {again}"
        )
    if sidecar.bin_sha256 not in (None, digest.hexdigest()):
        raise UserError(f"{path}: damaged, its SHA-256 is not that in {prefix}.json; {again}")
    checks = ("SHA-256 of .idx and .bin" if sidecar.bin_sha256 else "SHA-256 of .idx", "the range of ids")
    return Verified(source.documents, source.tokens, (low, high), checks)


def token_range(source: TokenSource, cache: IndexCache) -> tuple[int, int]:
    """Smallest and largest id of the .bin file, from ``cache`` where the file was read before."""

    def scan() -> Arrays:
        return {"range": np.array(_range(_blocks(source)), dtype=np.int64)}

    # The index says nothing of the ids, so the file itself is in the key; by its time, since hashing is a scan too.
    key = {
        "kind": "token range",
        "idx_sha256": source.idx_sha256,
        "bin_bytes": source.bin_bytes,
        "bin_mtime_ns": os.fstat(source.opened[0][0].fileno()).st_mtime_ns,
    }
    low, high = cache.get(key, scan)["range"].tolist()
    return low, high


def refuse_ids(dataset: "Samples", samples: Sequence[int]) -> NoReturn:
    """Say which file holds an id that ``dataset.vocab_size`` does not allow; one of ``samples`` (or -1: none) has it."""
    from megatron_ext.data.datasets import Blend, GPTSamples  # torch, which `data verify` does not need

    for index in samples:
        ids = dataset.read(index, 0, dataset.seq_len + 1) if index >= 0 else np.empty(0, dtype=np.int64)
        wrong = ids[(ids < 0) | (ids >= dataset.vocab_size)]
        if len(wrong):
            part = dataset.parts[int(dataset.part_of[index])] if isinstance(dataset, Blend) else dataset
            prefix = part.prefix if isinstance(part, GPTSamples) else "the data"
            raise UserError(
                f"{prefix}.bin: holds the token id {int(wrong[0])}, and model.vocab_size is {dataset.vocab_size:,}; the "
                f"file is damaged (see megatron-ext data verify {prefix}) or was changed after the run had started"
            )
    raise UserError("the token files are changed while the run reads them; start it again when they are whole")


def _blocks(source: TokenSource, digest: "hashlib._Hash | None" = None) -> Iterator[npt.NDArray[np.integer[Any]]]:
    with Path(f"{source.prefix}.bin").open("rb") as file:
        while data := file.read(_BLOCK_BYTES):
            if digest is not None:
                digest.update(data)
            yield np.frombuffer(data, dtype=source.dtype)


def _range(blocks: Iterator[npt.NDArray[np.integer[Any]]]) -> tuple[int, int]:
    low, high = zip(*((int(block.min()), int(block.max())) for block in blocks), strict=True)
    return min(low), max(high)
