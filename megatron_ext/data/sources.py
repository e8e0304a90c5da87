"""Token files opened and checked, and which of their documents a run trains and validates on.

Imports no torch, so that what is wrong with the data is said before there are ranks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from megatron_ext.config.data import DataConfig, DataSource
from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.token_files import DTYPES, HEADER, MAGIC, Sidecar, TokenPaths, file_sha256, read_sidecar
from megatron_ext.errors import UserError

if TYPE_CHECKING:
    from megatron_ext.data.tokenizers import Tokenizer

_CHECKED_TOGETHER = 1 << 20


@dataclass(frozen=True)
class TokenSource:
    """A checked pair of PREFIX.bin and PREFIX.idx. Made by :func:`open_source`."""

    prefix: str
    """Path without extension."""

    dtype: np.dtype[Any]
    """Type of a token id in the .bin file."""

    lengths: npt.NDArray[np.int32]
    """Tokens of every document [documents], memory-mapped."""

    positions: npt.NDArray[np.int64]
    """Byte in the .bin file at which every document begins [documents], memory-mapped."""

    bin_bytes: int
    """Size of the .bin file."""

    opened: tuple[tuple[IO[bytes], int], ...]
    """The .bin and the .idx file, open, each with its size."""

    idx_sha256: str
    """SHA-256 (hex) of the .idx file."""

    sidecar: Sidecar | None
    """What the tokens were made with; None for files of Megatron's own tools."""

    @property
    def documents(self) -> int:
        """Documents in the files."""
        return len(self.lengths)

    @cached_property
    def tokens(self) -> int:
        """Tokens in the files."""
        return self.bin_bytes // self.dtype.itemsize

    def tokens_between(self, first: int, end: int) -> int:
        """Tokens of documents [first, end)."""
        return int(self.lengths[first:end].sum(dtype=np.int64))

    def check_files(self) -> None:
        """Raise UserError where a file has become shorter: a read beyond its end would end the process (SIGBUS)."""
        for file, size in self.opened:
            if (found := os.fstat(file.fileno()).st_size) < size:
                raise UserError(
                    f"{file.name}: cut off while it was read, {found:,} bytes where it had {size:,}; bring the file "
                    "back and start again"
                )


def open_source(prefix: str) -> TokenSource:
    """Open a corpus and check that its files are whole and belong together.

    Raises:
        UserError: a file is missing, cut off, of another format, of other files, or there is no token in it.
    """
    paths = TokenPaths.of(prefix)
    for path in (paths.bin, paths.idx):
        if not path.is_file():
            hint = " (give the prefix without .bin or .idx)" if Path(prefix).suffix in {".bin", ".idx"} else ""
            raise UserError(f"data source {prefix}: {path} does not exist{hint}; megatron-ext preprocess writes it")
    try:
        opened = tuple((path.open("rb"), path.stat().st_size) for path in (paths.bin, paths.idx))
    except OSError as error:
        raise UserError(f"data source {prefix}: {error.filename} cannot be read ({error.strerror})") from None
    dtype, lengths, positions = _read_index(paths.idx)
    _check_sizes(paths, dtype, lengths, positions)
    idx_sha256, sidecar = file_sha256(paths.idx), read_sidecar(paths.sidecar)
    if sidecar is None:  # else the checksum tells
        _check_positions(paths.idx, dtype, lengths, positions)
    elif sidecar.idx_sha256 != idx_sha256:
        raise UserError(
            f"{paths.sidecar} describes other files than {paths.idx}; run megatron-ext preprocess again, or delete "
            f"{paths.sidecar} if the token files come from another tool"
        )
    return TokenSource(
        prefix=prefix,
        dtype=dtype,
        lengths=lengths,
        positions=positions,
        bin_bytes=opened[0][1],
        opened=opened,
        idx_sha256=idx_sha256,
        sidecar=sidecar,
    )


def check_tokens(source: TokenSource, *, tokenizer: "Tokenizer | None", vocab_size: int, cache: IndexCache) -> None:
    """Check that the tokens are the tokenizer's and the model has a row for each.

    With a sidecar both are read from it (``tokenizer`` is needed then); without one only the range of ids is checked,
    by one pass over the file whose result is kept in ``cache``.

    Raises:
        UserError: another tokenizer's tokens, or ids outside [0, vocab_size).
    """
    sidecar = source.sidecar
    if sidecar is not None:
        assert tokenizer is not None
        if tokenizer.digest != sidecar.tokenizer_digest:
            raise UserError(
                f"data source {source.prefix} was made with another tokenizer ({sidecar.tokenizer}, "
                f"{sidecar.vocab_size:,} ids) than data.tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} ids); set "
                "data.tokenizer to it or run megatron-ext preprocess again"
            )
        low, high = 0, sidecar.max_token
    elif np.iinfo(source.dtype).min == 0 and np.iinfo(source.dtype).max < vocab_size:
        return
    else:
        from megatron_ext.data.verify import token_range  # a pass over the file, kept in the cache

        low, high = token_range(source, cache)
    if low < 0:
        raise UserError(f"data source {source.prefix}: holds the negative token id {low}; these are no token files")
    if high >= vocab_size:
        raise UserError(
            f"model.vocab_size {vocab_size:,} is too small for the data: {source.prefix} holds token id {high}; set it "
            f"to at least {high + 1}"
        )


def _read_index(path: Path) -> tuple[np.dtype[Any], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise UserError(f"{path}: not an index of token files; megatron-ext preprocess writes one")
    _, version, code, sequences, boundaries = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise UserError(f"{path}: unknown version {version} or data type {code} of the index format")
    dtype = np.dtype(DTYPES[code])
    if dtype.kind == "f":
        raise UserError(f"{path}: holds {dtype} values, token ids are integers")
    expected = HEADER.size + sequences * 12 + boundaries * 8
    if size == expected + sequences and sequences:
        raise UserError(f"{path}: a multimodal index; text alone is supported")
    if size != expected:
        raise UserError(f"{path}: cut off or damaged, {size:,} bytes where its header calls for {expected:,}")
    if not sequences:
        raise UserError(f"{path}: empty corpus, it holds no document")
    # The file stays mapped for as long as these views of it live.
    content = np.asarray(np.memmap(path, mode="r"))
    start = HEADER.size
    lengths = content[start : start + 4 * sequences].view(np.int32)
    positions = content[start + 4 * sequences : start + 12 * sequences].view(np.int64)
    documents = content[start + 12 * sequences :].view(np.int64)
    if not boundaries or documents[-1] != sequences:
        raise UserError(f"{path}: damaged, its document boundaries do not end with its {sequences:,} sequences")
    return dtype, lengths, positions


def _check_sizes(
    paths: TokenPaths, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]
) -> None:
    tokens = int(lengths.sum(dtype=np.int64))
    if int(lengths.min()) < 0 or int(positions[-1]) + int(lengths[-1]) * dtype.itemsize != tokens * dtype.itemsize:
        raise _contradicted(paths.idx)
    if not tokens:
        raise UserError(f"{paths.idx}: empty corpus, it holds no token")
    found, expected = paths.bin.stat().st_size, tokens * dtype.itemsize
    if found < expected:
        raise UserError(f"{paths.bin}: cut off, {found:,} bytes where {paths.idx} calls for {expected:,}")
    if found > expected:
        raise UserError(
            f"{paths.bin}: {found:,} bytes where {paths.idx} calls for {expected:,}; they do not belong together"
        )


def _check_positions(
    path: Path, dtype: np.dtype[Any], lengths: npt.NDArray[np.int32], positions: npt.NDArray[np.int64]
) -> None:
    """Every document begins where the one before ends; looked at in parts, which bounds the memory."""
    if positions[0]:
        raise _contradicted(path)
    for first in range(0, len(lengths), _CHECKED_TOGETHER):
        part = slice(first, first + _CHECKED_TOGETHER + 1)  # the last one of a part is the first one of the next
        if (np.diff(positions[part]) != np.int64(dtype.itemsize) * lengths[part][:-1]).any():
            raise _contradicted(path)


def _contradicted(path: Path) -> UserError:
    return UserError(
        f"{path}: damaged, its lengths and positions contradict each other; fetch it or run megatron-ext preprocess again"
    )


Use = Literal["train", "valid"]

_PLACES: Final[dict[Use, int]] = {"train": 0, "valid": 1}
"""Where a use's share stands in ``data.split``."""


@dataclass(frozen=True)
class Part:
    """A run of documents of one corpus, for training or for validation."""

    source: TokenSource
    first: int
    end: int
    weight: float
    use: Use

    @property
    def tokens(self) -> int:
        """Tokens of its documents."""
        return self.source.tokens_between(self.first, self.end)

    def samples(self, seq_len: int) -> int:
        """Whole samples in one pass; the last token of each is the first one of the next."""
        return (self.tokens - 1) // seq_len


def check_data(data: DataConfig, *, seq_len: int, vocab_size: int) -> None:
    """Find what is wrong with the data of a run, as every rank would.

    Args:
        data: The corpora.
        seq_len: Tokens of a full sample (``training.seq_len``).
        vocab_size: Rows of the model's embedding that stand for tokens (``model.vocab_size``).

    Raises:
        UserError: files missing, damaged or of another tokenizer; ids beyond ``vocab_size``; too little data for one
            sample of ``seq_len + 1`` tokens in training or validation; index cache not writable.
    """
    open_parts(data, ("train", "valid"), seq_len=seq_len, vocab_size=vocab_size, cache=index_cache(data))


def index_cache(data: DataConfig) -> IndexCache:
    """Where the index is kept: ``data.index_cache``, by default beside the first training corpus."""
    if data.index_cache is not None:
        return IndexCache(Path(data.index_cache))
    return IndexCache(Path(_entries(data, "train")[0].prefix).parent / "index_cache")


def _entries(data: DataConfig, use: Use) -> Sequence[DataSource]:
    entries = data.sources or (data.train if use == "train" else data.valid)
    assert entries, "checked with the config"
    return entries


def open_parts(
    data: DataConfig, uses: Sequence[Use], *, seq_len: int, vocab_size: int, cache: IndexCache
) -> list[list[Part]]:
    """The documents of each use, every corpus opened and checked once. Raises as :func:`check_data` does."""
    prefixes = dict.fromkeys(entry.prefix for use in uses for entry in _entries(data, use))
    opened = {prefix: open_source(prefix) for prefix in prefixes}
    described = any(source.sidecar for source in opened.values())
    tokenizer = None
    if described:
        from megatron_ext.data.tokenizers import load_tokenizer  # token files without a sidecar need none

        tokenizer = load_tokenizer(data.tokenizer)
    for source in opened.values():
        check_tokens(source, tokenizer=tokenizer, vocab_size=vocab_size, cache=cache)
    parts: list[list[Part]] = []
    for use in uses:
        parts.append([])
        for entry in _entries(data, use):
            source = opened[entry.prefix]
            first, end = _share(source.documents, data.split, use) if data.sources else (0, source.documents)
            part = Part(source=source, first=first, end=end, weight=entry.weight, use=use)
            _check_part(part, seq_len=seq_len, split=data.split if data.sources else None)
            parts[-1].append(part)
    return parts


def _share(documents: int, split: tuple[float, float, float], use: Use) -> tuple[int, int]:
    """Documents [first, end) of a use, with megatron-core's rounding."""
    place = _PLACES[use]
    edges = np.cumsum([0.0, *split]) / sum(split)
    return round(edges[place] * documents), round(edges[place + 1] * documents)


def _check_part(part: Part, *, seq_len: int, split: tuple[float, float, float] | None) -> None:
    if part.samples(seq_len) > 0:
        return
    prefix, use, total = part.source.prefix, part.use, part.source.documents
    shares = f" of {total:,} under data.split {list(split)}" if split else ""
    remedy = "give data.split another share or name more data" if split else "name more data"
    raise UserError(
        f"data source {prefix}: its {part.end - part.first:,} {use} documents{shares} hold {part.tokens:,} tokens, "
        f"less than one sample of training.seq_len + 1 = {seq_len + 1:,}; lower training.seq_len, {remedy}"
    )
