"""Token files read from end to end: whether they are those that were written, and which one holds a wrong id."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from megatron_ext.data.sources import id_range, open_source, token_blocks
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.data.datasets import Samples


@dataclass(frozen=True)
class Verified:
    """What is known of token files that were found right."""

    documents: int
    """Documents in them."""

    tokens: int
    """Tokens, separators included."""

    ids: tuple[int, int]
    """Smallest and largest id."""

    against: tuple[str, ...]
    """What they were compared with; nothing for the files of another tool, which say nothing of themselves."""


def verify(prefix: str) -> Verified:
    """Read PREFIX.bin from end to end and compare it with what PREFIX.idx and PREFIX.json say.

    Raises:
        UserError: the files are not whole, or not those that were written.
    """
    source, digest = open_source(prefix), hashlib.sha256()
    path, sidecar = f"{prefix}.bin", source.sidecar

    def hashed() -> Iterator[bytes]:
        for block in token_blocks(source):
            digest.update(block)
            yield block

    low, high = id_range(source, hashed())
    again = "fetch the file again or run megatron-ext preprocess"
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


def refuse_ids(dataset: "Samples", samples: Sequence[int]) -> NoReturn:
    """Say which file holds an id that ``dataset.vocab_size`` does not allow, in one of ``samples`` (-1: none)."""
    from megatron_ext.data.blend import Blend  # torch, which `data verify` does not need
    from megatron_ext.data.datasets import GPTSamples

    for index in samples:
        ids = dataset.read(index, 0, dataset.seq_len + 1) if index >= 0 else np.empty(0, dtype=np.int64)
        wrong = ids[(ids < 0) | (ids >= dataset.vocab_size)]
        if len(wrong):
            part = dataset.parts[int(dataset.part_of[index])] if isinstance(dataset, Blend) else dataset
            prefix = part.prefix if isinstance(part, GPTSamples) else "the data"
            raise UserError(
                f"{prefix}.bin: holds the token id {int(wrong[0])}, and model.vocab_size is {dataset.vocab_size:,}; "
                f"the file is damaged (see megatron-ext data verify {prefix}) or was changed after the run had started"
            )
    raise UserError("the token files are changed while the run reads them; start it again when they are whole")
