"""Reading documents: every format gives the same ones, line numbers are right, damage is named."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data import reading
from megatron_ext.data.reading import InvalidRecordError, Record, check_files, parse_record, read_chunks, read_texts
from megatron_ext.errors import UserError

TEXTS = ["first", "zweites ü", "third\nwith a line break", "", "last 中"]


def _lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n" for text in texts)


@pytest.mark.parametrize(
    ("name", "encode"),
    [
        ("a.jsonl", bytes),
        ("a.json", bytes),
        ("a.jsonl.gz", gzip.compress),
        ("a.gz", gzip.compress),
        ("a.jsonl.zst", zstandard.compress),
        ("two.gz", lambda data: gzip.compress(data[:50]) + b"\0" * 70_000 + gzip.compress(data[50:])),
        ("two.zst", lambda data: zstandard.compress(data[:50]) + zstandard.compress(data[50:])),
        ("bom.jsonl", lambda data: b"\xef\xbb\xbf" + data),
        ("crlf.jsonl", lambda data: data.replace(b"\n", b"\r\n")),
        ("unterminated.jsonl", lambda data: data.rstrip(b"\n")),
        ("blank.jsonl", lambda data: b"\n \n" + data + b"\n\n"),
    ],
)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str, encode: Callable[[bytes], bytes]) -> None:
    path = tmp_path / name
    path.write_bytes(encode(_lines(TEXTS)))
    assert list(read_texts((path,), "text")) == TEXTS
    assert sum(chunk.bytes_read for chunk in read_chunks(path)) == path.stat().st_size


def test_text_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.md.gz").write_bytes(gzip.compress(b"three"))
    (tmp_path / "empty.txt").write_text("")
    files = tuple(tmp_path / name for name in ("a.txt", "empty.txt", "b.md.gz"))
    assert list(read_texts(files, "text")) == ["one\ntwo\n", "three"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("blocks")


@given(
    texts=st.lists(st.text(max_size=30), max_size=12),
    block=st.integers(1, 40),
    chunk=st.integers(1, 100),
    end=st.booleans(),
)
@settings(max_examples=150)
def test_block_and_chunk_sizes_do_not_matter(folder: Path, texts: list[str], block: int, chunk: int, end: bool) -> None:
    path = folder / "a.jsonl"
    data = _lines(texts)
    path.write_bytes(data if end else data.rstrip(b"\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_READ_BYTES", block)
        patch.setattr(reading, "CHUNK_BYTES", chunk)
        chunks = list(read_chunks(path))
    records = [record for part in chunks for record in part.records]
    assert [parse_record("a", record, "text") for record in records] == texts
    assert [record.line for record in records] == list(range(1, len(texts) + 1))
    assert sum(part.bytes_read for part in chunks) == path.stat().st_size


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"text": "cut', r"a\.jsonl, line 7: broken JSON"),
        (b'{"text": "cut', r"broken JSON \(Unterminated string starting at, column 10\)$"),
        (b'["text"]', "a JSON object is expected, found list"),
        (b'{"body": "x", "id": 1}', r"no key 'text' \(keys: 'body', 'id'\); name the right one with --json-key"),
        (b"{}", r"no key 'text' \(keys: none\)"),
        (b'{"text": 5}', "key 'text' is int, a string is expected"),
        (b'{"text": "\xff"}', r"line 7: not UTF-8 \(byte 10\)"),
        (b'{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        (b'{"text": ' + b"9" * 5000 + b"}", "broken JSON"),
        (b"[" * 100_000, "broken JSON"),
    ],
)
def test_invalid_records_are_named(raw: bytes, message: str) -> None:
    with pytest.raises(InvalidRecordError, match=message):
        parse_record("a.jsonl", Record(line=7, raw=raw), "text")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl.gz", gzip.compress(_lines(TEXTS * 999))[:-20], "cut off"),
        ("a.jsonl.zst", zstandard.compress(_lines(TEXTS * 999))[:-4], "cut off"),
        ("a.jsonl.gz", b"no gzip at all", "damaged or not a gzip file"),
        ("a.jsonl.zst", b"no zstd at all", "damaged or not a zstd file"),
    ],
)
def test_damaged_compression_is_told(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}.*{message}"):
        list(read_chunks(tmp_path / name))


@pytest.mark.parametrize(
    ("names", "message"),
    [(["none.jsonl"], r"none\.jsonl: no such file"), ([""], "is a directory"), ([], "no input files")],
)
def test_missing_files_are_named(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_files(tuple(tmp_path / name for name in names))
