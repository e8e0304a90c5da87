"""Documents out of files: JSON lines or plain text, gzip and zstd, in bounded memory and with line numbers."""

import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from megatron_ext.errors import UserError

CHUNK_BYTES = 256 * 1024

_READ_BYTES = 64 * 1024  # small, so that one block of a highly compressible file cannot fill the memory
_LARGE = 1 << 20
_JSON_SUFFIXES = frozenset({".jsonl", ".json", ".ndjson"})
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One undecoded document and where it stands."""

    line: int
    """1-based line in a JSON lines file; 0 for a whole text file."""

    raw: bytes
    """The JSON line, or the file's content."""


@dataclass(frozen=True)
class Chunk:
    """Consecutive records of one file, about :data:`CHUNK_BYTES` of them."""

    path: str
    """The file they come from."""

    records: tuple[Record, ...]
    """In the order of the file."""

    bytes_read: int
    """Bytes of the file (compressed, where it is) read for this chunk."""


class InvalidRecordError(ValueError):
    """A record that is no document; the message names file and line."""


def is_json_lines(path: Path) -> bool:
    """Whether a file is read as JSON lines, by its name without .gz/.zst; a bare .gz/.zst is; all others are text."""
    compressed = path.suffix in {".gz", ".zst"}
    inner = Path(path.stem).suffix if compressed else path.suffix
    return inner in _JSON_SUFFIXES or (compressed and not inner)


def read_chunks(path: Path) -> Iterator[Chunk]:
    """Read a file record by record.

    Raises:
        UserError: the file is missing, unreadable, or its compressed data is damaged or cut off.
    """
    records: list[Record] = []
    size, reported = 0, 0
    for record, position in _json_records(path) if is_json_lines(path) else _text_record(path):
        records.append(record)
        size += len(record.raw)
        if size >= CHUNK_BYTES:
            yield Chunk(path=str(path), records=tuple(records), bytes_read=position - reported)
            records, size, reported = [], 0, position
    # An empty last chunk still reports the bytes of trailing blank lines.
    yield Chunk(path=str(path), records=tuple(records), bytes_read=path.stat().st_size - reported)


def place(path: str, record: Record) -> str:
    """Where a record stands, for messages."""
    return f"{path}, line {record.line}" if record.line else path


def parse_record(path: str, record: Record, json_key: str) -> str:
    """Text of a record.

    Raises:
        InvalidRecordError: not UTF-8, broken JSON, no object, key missing, not a string, or half a surrogate pair.
    """
    where = place(path, record)
    if record.line and len(record.raw) > _LARGE:
        # Needs half the memory; what it does not take goes the long way, to the same text or to a message.
        with suppress(ValueError, AttributeError):
            large = orjson.loads(record.raw).get(json_key)
            if isinstance(large, str):
                return large
    try:
        text = record.raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRecordError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8") from error
    if not record.line:
        return text
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError as error:
        # Its own text counts lines within the record and would contradict the line named here.
        raise InvalidRecordError(f"{where}: broken JSON ({error.msg}, column {error.colno})") from error
    except (ValueError, RecursionError) as error:
        raise InvalidRecordError(f"{where}: broken JSON ({error})") from error
    if not isinstance(value, dict):
        raise InvalidRecordError(f"{where}: a JSON object is expected, found {type(value).__name__}")
    if json_key not in value:
        found = ", ".join(map(repr, list(value)[:8])) or "none"
        raise InvalidRecordError(f"{where}: no key {json_key!r} (keys: {found}); name the right one with --json-key")
    document = value[json_key]
    if not isinstance(document, str):
        raise InvalidRecordError(f"{where}: key {json_key!r} is {type(document).__name__}, a string is expected")
    try:
        document.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRecordError(f"{where}: half a surrogate pair at character {error.start}") from error
    return document


def read_texts(files: tuple[Path, ...], json_key: str) -> Iterator[str]:
    """Texts of all documents in order. Raises UserError at the first invalid one."""
    for path in files:
        for chunk in read_chunks(path):
            for record in chunk.records:
                try:
                    yield parse_record(chunk.path, record, json_key)
                except InvalidRecordError as error:
                    raise UserError(str(error)) from error


def check_files(files: tuple[Path, ...]) -> int:
    """Total size of the files in bytes. Raises UserError for none, or for one that is missing or a directory."""
    if not files:
        raise UserError("no input files given")
    for path in files:
        if path.is_dir():
            raise UserError(f"{path} is a directory; name the files in it")
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    return sum(path.stat().st_size for path in files)


def _json_records(path: Path) -> Iterator[tuple[Record, int]]:
    rest: list[bytes] = []
    line, position = 0, 0
    for block, position in _blocks(path):
        *complete, last = block.split(b"\n")
        for index, piece in enumerate(complete):
            raw = b"".join([*rest, piece]) if index == 0 else piece
            rest = [] if index == 0 else rest
            line += 1
            if line == 1:
                raw = raw.removeprefix(_BYTE_ORDER_MARK)
            if raw.strip():
                yield Record(line=line, raw=raw), position
        rest.append(last)
    raw = b"".join(rest)
    if line == 0:
        raw = raw.removeprefix(_BYTE_ORDER_MARK)
    if raw.strip():
        yield Record(line=line + 1, raw=raw), position


def _text_record(path: Path) -> Iterator[tuple[Record, int]]:
    blocks = list(_blocks(path))
    raw = b"".join(block for block, _ in blocks).removeprefix(_BYTE_ORDER_MARK)
    if raw.strip():
        yield Record(line=0, raw=raw), blocks[-1][1]


def _blocks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Decompressed blocks, each with the position in the file after it."""
    try:
        with path.open("rb") as file:
            position = 0
            decoder: Any = None
            while raw := file.read(_READ_BYTES):
                position += len(raw)
                if path.suffix not in {".gz", ".zst"}:
                    yield raw, position
                    continue
                while raw:
                    if decoder is None:
                        # Files may be several compressed streams one after the other, with zeros between them (gzip).
                        raw = raw.lstrip(b"\0")
                        decoder = _decoder(path) if raw else None
                        continue
                    yield decoder.decompress(raw), position
                    raw = decoder.unused_data if decoder.eof else b""
                    decoder = None if decoder.eof else decoder
            if decoder is not None:
                raise UserError(f"{path}: cut off, the compressed data has no end; fetch or make the file again")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except zlib.error as error:
        raise UserError(f"{path}: damaged or not a gzip file ({error})") from error


def _decoder(path: Path) -> Any:
    if path.suffix == ".gz":
        return zlib.decompressobj(wbits=31)
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst needs a package; run: pip install zstandard") from error
    return _ZstdStream(path, zstandard)


class _ZstdStream:
    """zlib's interface for one zstd frame, with the file's name in its errors."""

    def __init__(self, path: Path, module: Any) -> None:
        self._path, self._error = path, module.ZstdError
        # Frames written with --long have windows beyond the library's default limit.
        self._frame = module.ZstdDecompressor(max_window_size=2**31).decompressobj()

    def decompress(self, raw: bytes) -> bytes:
        try:
            data: bytes = self._frame.decompress(raw)
        except self._error as error:
            raise UserError(f"{self._path}: damaged or not a zstd file ({error})") from error
        return data

    @property
    def eof(self) -> bool:
        return bool(self._frame.eof)

    @property
    def unused_data(self) -> bytes:
        data: bytes = self._frame.unused_data
        return data
