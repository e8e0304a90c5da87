"""Preprocessing: Megatron's bytes, one output for any number of workers, nothing left behind by a failure."""

import gzip
import hashlib
import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

from megatron_ext.data.preprocess import PreprocessOptions, preprocess, preprocess_steps
from megatron_ext.data.token_files import TokenPaths, read_sidecar
from megatron_ext.data.token_writer import token_dtype
from megatron_ext.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from megatron_ext.errors import UserError

TEXTS = [f"document {i} " + "the quick brown fox " * (i % 17) for i in range(300)]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tokenizer") / "tok.json"
    save_tokenizer(train_tokenizer(TEXTS, vocab_size=300), path)
    return str(path)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def _digests(prefix: Path) -> list[str]:
    paths = TokenPaths.of(prefix)
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in (paths.bin, paths.idx, paths.sidecar)]


def _megatron_files(prefix: Path, tokenizer: Tokenizer, texts: list[str]) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size))
    for text in texts:
        ids = [*tokenizer.encode(text), tokenizer.eod]
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(f"{prefix}.idx")


def test_files_are_those_of_megatron(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    preprocess((corpus,), tmp_path / "ours", PreprocessOptions(tokenizer=tokenizer_path))
    tokenizer = load_tokenizer(tokenizer_path)
    _megatron_files(tmp_path / "theirs", tokenizer, TEXTS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert dataset.index.dtype == np.uint16
    read = [tokenizer.decode(dataset[index]) for index in range(len(dataset))]
    assert read == [text + "<|endoftext|>" for text in TEXTS]


def test_dtype_is_chosen_as_megatron_does() -> None:
    for size in (257, 50257, 65499, 65500, 65536, 128_256):
        assert token_dtype(size) == DType.optimal_dtype(size)


def test_workers_do_not_change_the_output(
    tmp_path: Path, corpus: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_ext.data.reading.CHUNK_BYTES", 2000)  # many chunks, of unequal work
    gz = tmp_path / "more.jsonl.gz"
    gz.write_bytes(gzip.compress(corpus.read_bytes()))
    files = (corpus, gz, corpus)
    one = preprocess(files, tmp_path / "one", PreprocessOptions(tokenizer=tokenizer_path))
    many = preprocess(files, tmp_path / "many", PreprocessOptions(tokenizer=tokenizer_path, workers=3))
    assert _digests(tmp_path / "many") == _digests(tmp_path / "one")
    assert one == many
    assert one.documents == 900
    assert one.bytes_read == sum(path.stat().st_size for path in files)


def test_sidecar_tells_what_was_written(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    finished = preprocess((corpus,), tmp_path / "out", PreprocessOptions(tokenizer=tokenizer_path)).finished
    tokenizer = load_tokenizer(tokenizer_path)
    sidecar = read_sidecar(tmp_path / "out.json")
    assert sidecar is not None
    assert sidecar == finished
    tokens = np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    assert (sidecar.tokens, sidecar.documents, sidecar.max_token) == (len(tokens), len(TEXTS), tokens.max())
    assert (sidecar.tokenizer_digest, sidecar.vocab_size, sidecar.eod) == (tokenizer.digest, 300, 299)
    assert sidecar.idx_sha256 == hashlib.sha256((tmp_path / "out.idx").read_bytes()).hexdigest()


def test_largest_id_is_that_of_all_chunks(tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ext.data.reading.CHUNK_BYTES", 1)  # a chunk for every document
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "quick brown fox"}\n{"text": "!"}\n')
    done = preprocess((source,), tmp_path / "out", PreprocessOptions(tokenizer=tokenizer_path, append_eod=False))
    assert done.finished is not None
    assert done.finished.max_token == np.fromfile(tmp_path / "out.bin", dtype=np.uint16).max() > 256


def test_without_separators(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    done = preprocess((corpus,), tmp_path / "out", PreprocessOptions(tokenizer=tokenizer_path, append_eod=False))
    assert done.finished is not None
    assert done.finished.eod is None
    tokenizer = load_tokenizer(tokenizer_path)
    assert tokenizer.eod not in np.fromfile(tmp_path / "out.bin", dtype=np.uint16)
    dataset = IndexedDataset(str(tmp_path / "out"))  # a name: its arrays are gone when it is
    assert dataset[3].tolist() == tokenizer.encode(TEXTS[3])


def test_other_key_and_empty_documents(tmp_path: Path, tokenizer_path: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "x"}\n{"body": ""}\n{"body": "y"}\n')
    done = preprocess((source,), tmp_path / "out", PreprocessOptions(tokenizer=tokenizer_path, json_key="body"))
    assert (done.documents, done.empty, done.tokens) == (2, 1, 4)


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_line_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_path: str, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr("megatron_ext.data.reading.CHUNK_BYTES", 200)
    source = tmp_path / "in" / "a.jsonl"
    source.parent.mkdir()
    lines = [json.dumps({"text": text}) for text in TEXTS]
    lines[41] = lines[41][:20]
    lines[150] = "{}"
    source.write_text("\n".join(lines))
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"a\.jsonl, line 42: broken JSON.*--skip-invalid") as caught:
        preprocess((source,), out / "x", PreprocessOptions(tokenizer=tokenizer_path, workers=workers))
    assert list(out.iterdir()) == []
    assert multiprocessing.active_children() == [], caught  # while the error, and so its stack, is still held

    options = PreprocessOptions(tokenizer=tokenizer_path, workers=workers, skip_invalid=True)
    done = preprocess((source,), out / "x", options)
    assert (done.documents, done.invalid) == (298, 2)
    assert done.first_invalid is not None
    assert "line 42" in done.first_invalid


def test_stopping_early_leaves_nothing(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    steps = preprocess_steps((corpus, corpus), tmp_path / "out" / "x", PreprocessOptions(tokenizer=tokenizer_path))
    assert next(iter(steps)).documents == 300
    assert len(list((tmp_path / "out").iterdir())) == 1
    steps.close()  # type: ignore[attr-defined]
    assert list((tmp_path / "out").iterdir()) == []


def test_existing_output_is_kept_unless_overwritten(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    options = PreprocessOptions(tokenizer=tokenizer_path)
    preprocess((corpus,), tmp_path / "out", options)
    before = _digests(tmp_path / "out")
    small = tmp_path / "small.txt"
    small.write_text("other text")
    with pytest.raises(UserError, match=r"out\.bin exists.*--overwrite"):
        preprocess((small,), tmp_path / "out", options)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{")
    overwrite = PreprocessOptions(tokenizer=tokenizer_path, overwrite=True)
    with pytest.raises(UserError, match="broken JSON"):
        preprocess((broken,), tmp_path / "out", overwrite)
    assert _digests(tmp_path / "out") == before
    assert preprocess((small,), tmp_path / "out", overwrite).documents == 1
    assert len(IndexedDataset(str(tmp_path / "out"))) == 1


def test_input_is_never_overwritten(tmp_path: Path, tokenizer_path: str) -> None:
    source = tmp_path / "corpus.json"  # also the name of the sidecar of prefix "corpus"
    source.write_text('{"text": "a"}\n')
    options = PreprocessOptions(tokenizer=tokenizer_path, overwrite=True)
    with pytest.raises(UserError, match=r"would write .*corpus\.json, which is an input file"):
        preprocess((source,), tmp_path / "corpus", options)
    other = tmp_path / "b.txt"
    other.write_text("b")
    with pytest.raises(UserError, match=r"corpus\.json exists and is not a description"):
        preprocess((other,), tmp_path / "corpus", options)
    assert source.read_text() == '{"text": "a"}\n'


def test_bad_requests(tmp_path: Path, corpus: Path, tokenizer_path: str) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    for source, output, workers, message in (
        ("empty.jsonl", "out", 1, r"empty corpus: no document in .*empty\.jsonl"),
        ("none.jsonl", "out", 1, "no such file"),
        (corpus.name, "out.bin", 1, r"give the prefix without \.bin"),
        (corpus.name, "out", 0, "--workers 0"),
    ):
        options = PreprocessOptions(tokenizer=tokenizer_path, workers=workers)
        with pytest.raises(UserError, match=message):
            preprocess((tmp_path / source,), tmp_path / output, options)
    assert not list(tmp_path.glob("*out*"))


def test_workers_start_without_torch() -> None:
    code = "import sys, megatron_ext.data.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
