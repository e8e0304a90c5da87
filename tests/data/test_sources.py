"""Opening a corpus: whole files pass, every kind of damage is named with its file."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.sources import check_tokens, open_source
from megatron_ext.data.tokenizers import train_tokenizer
from megatron_ext.errors import UserError
from tests.data.corpora import documents, write_tokens


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_tokens(tmp_path / "v1.0", documents(50))


@pytest.fixture
def cache(tmp_path: Path) -> IndexCache:
    return IndexCache(tmp_path / "cache")


def test_whole_files_pass(prefix: str) -> None:
    docs = documents(50)
    source = open_source(prefix)
    assert source.lengths.tolist() == [len(doc) for doc in docs]
    assert (source.documents, source.tokens, source.dtype) == (50, sum(map(len, docs)), np.dtype(np.uint16))
    assert source.tokens_between(10, 20) == sum(map(len, docs[10:20]))
    assert source.sidecar is None


def test_files_of_megatron_pass(tmp_path: Path) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "m.bin"), dtype=np.int32)
    for n in (3, 1, 4):
        builder.add_item(torch.arange(n))
    builder.end_document()  # one document of three sequences
    builder.finalize(str(tmp_path / "m.idx"))
    assert open_source(str(tmp_path / "m")).lengths.tolist() == [3, 1, 4]


def _patch(path: str, offset: int, data: bytes) -> None:
    with Path(path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: str, suffix: str) -> None:
    Path(prefix + suffix).unlink()
    with pytest.raises(UserError, match=rf"v1\.0\{suffix} does not exist; megatron-ext preprocess"):
        open_source(prefix)
    with pytest.raises(UserError, match=r"give the prefix without \.bin or \.idx"):
        open_source(prefix + ".bin")


@pytest.mark.parametrize(
    ("suffix", "size", "message"),
    [
        (".bin", -2, r"v1\.0\.bin: cut off, [\d,]+ bytes where .*\.idx calls for"),
        (".bin", +4, r"v1\.0\.bin: .*do not belong together"),
        *((".idx", keep, r"v1\.0\.idx: (cut off|not an index)") for keep in (0, 20, 34, 500)),
    ],
)
def test_file_of_another_size(prefix: str, suffix: str, size: int, message: str) -> None:
    path = Path(prefix + suffix)
    os.truncate(path, size + (path.stat().st_size if suffix == ".bin" else 0))
    with pytest.raises(UserError, match=message):
        open_source(prefix)


@pytest.mark.parametrize(
    ("offset", "data", "message"),
    [
        (0, b"TNTIDX", "not an index of token files"),
        (9, struct.pack("<Q", 2), "unknown version 2"),
        (17, b"\x63", "data type 99"),
        (17, b"\x07", "holds float32 values"),
        (34, struct.pack("<i", -5), "contradict each other"),
        (34, struct.pack("<i", 1), "contradict each other"),
    ],
)
def test_damaged_index(prefix: str, offset: int, data: bytes, message: str) -> None:
    _patch(prefix + ".idx", offset, data)
    with pytest.raises(UserError, match=message):
        open_source(prefix)


@pytest.mark.parametrize(("documents", "missing"), [(0, "document"), (1, "token")])
def test_empty_corpus(tmp_path: Path, documents: int, missing: str) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "e.bin"), dtype=np.uint16)
    for _ in range(documents):
        builder.add_document(np.array([], dtype=np.int32), [0])
    builder.finalize(str(tmp_path / "e.idx"))
    with pytest.raises(UserError, match=rf"e\.idx: empty corpus, it holds no {missing}"):
        open_source(str(tmp_path / "e"))


def test_sidecar_of_other_files(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "a", documents(5), sidecar=True)
    assert open_source(prefix).sidecar is not None
    other = write_tokens(tmp_path / "b", documents(6), sidecar=True)
    Path(other + ".json").replace(prefix + ".json")
    with pytest.raises(UserError, match=r"a\.json describes other files"):
        open_source(prefix)


def test_tokens_of_another_tokenizer(tmp_path: Path, cache: IndexCache) -> None:
    source = open_source(write_tokens(tmp_path / "a", documents(5), sidecar=True))
    with pytest.raises(UserError, match=r"made with another tokenizer \(a\.json, 60,000 ids\) than data\.tokenizer"):
        check_tokens(source, tokenizer=train_tokenizer(["a"], vocab_size=257), vocab_size=60_000, cache=cache)


def test_ids_beyond_the_vocabulary_are_found_without_a_sidecar(prefix: str, cache: IndexCache) -> None:
    largest = max(int(doc.max()) for doc in documents(50))
    source = open_source(prefix)
    check_tokens(source, tokenizer=None, vocab_size=largest + 1, cache=cache)
    with pytest.raises(UserError, match=rf"model\.vocab_size .* too small for the data: .* at least {largest + 1}"):
        check_tokens(source, tokenizer=None, vocab_size=largest, cache=cache)


def test_changed_tokens_are_scanned_again(prefix: str, cache: IndexCache) -> None:
    check_tokens(open_source(prefix), tokenizer=None, vocab_size=5000, cache=cache)
    _patch(prefix + ".bin", 0, struct.pack("<H", 6000))
    os.utime(prefix + ".bin", ns=(1, 1))
    with pytest.raises(UserError, match="holds token id 6000"):
        check_tokens(open_source(prefix), tokenizer=None, vocab_size=5000, cache=cache)


def test_negative_ids(tmp_path: Path, cache: IndexCache) -> None:
    builder = IndexedDatasetBuilder(str(tmp_path / "n.bin"), dtype=np.int32)
    builder.add_document(np.array([5, -3, 7]), [3])
    builder.finalize(str(tmp_path / "n.idx"))
    with pytest.raises(UserError, match="negative token id -3"):
        check_tokens(open_source(str(tmp_path / "n")), tokenizer=None, vocab_size=100, cache=cache)
