"""``preprocess`` and ``tokenizer train`` as a user types them: output, exit codes, messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data.token_files import read_sidecar


def _run(*arguments: str | Path, largest_file: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command; with ``largest_file`` as on a disk on which no file can have more bytes."""
    limit = "" if largest_file is None else f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file},) * 2); "
    start = f"import resource, runpy; {limit}runpy.run_module('megatron_ext', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "to be or not to be"}\n' * 50 + '{"text": "cut\n' + '{"text": "that is"}\n')
    return path


def test_train_a_tokenizer_then_preprocess_with_it(tmp_path: Path, corpus: Path) -> None:
    tokenizer, prefix = tmp_path / "tok.json", tmp_path / "out"
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be " * 50)
    trained = _run("tokenizer", "train", text, "--vocab-size", "264", "--output", tokenizer)
    assert trained.returncode == 0, trained.stderr
    assert "264 tokens" in trained.stdout

    command = ("preprocess", corpus, "--output", prefix, "--tokenizer", tokenizer, "--workers", "2")
    refused = _run(*command)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.splitlines()) == 1
    assert "a.jsonl, line 51: broken JSON" in refused.stderr
    assert not prefix.with_suffix(".bin").exists()

    done = _run(*command, "--skip-invalid")
    assert done.returncode == 0, done.stderr
    assert "51 documents" in done.stdout
    assert "1 invalid records skipped" in done.stderr
    sidecar = read_sidecar(tmp_path / "out.json")
    assert sidecar is not None
    assert sidecar.documents == 51

    again = _run(*command, "--skip-invalid")
    assert again.returncode == 2
    assert "--overwrite" in again.stderr


def test_missing_tokenizer_file(tmp_path: Path, corpus: Path) -> None:
    result = _run("preprocess", corpus, "--output", tmp_path / "out", "--tokenizer", tmp_path / "no.json")
    assert result.returncode == 2
    assert "no.json: no such file" in result.stderr


@pytest.mark.parametrize("largest_file", [0, 100])  # bytes of the .bin file; with 100 it fails on the way
def test_full_disk_is_told_and_nothing_is_left(tmp_path: Path, largest_file: int) -> None:
    text, tokenizer = tmp_path / "a.txt", tmp_path / "tok.json"
    text.write_text("to be or not to be " * 50)
    _run("tokenizer", "train", text, "--vocab-size", "264", "--output", tokenizer)
    before = sorted(tmp_path.iterdir())
    command = ("preprocess", text, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    result = _run(*command, largest_file=largest_file)
    assert result.returncode == 2, result.stderr
    assert f"error: --output {tmp_path / 'out'}: cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


def test_place_that_cannot_be_written_is_told(tmp_path: Path, corpus: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("to be or not to be " * 50)
    for command, output in (
        (("tokenizer", "train", text, "--vocab-size", "264"), corpus / "tok.json"),
        (("preprocess", text, "--tokenizer", "gpt2"), corpus / "out"),
    ):
        result = _run(*command, "--output", output)
        assert result.returncode == 2, result.stderr
        assert f"{output}: cannot be written" in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_empty_corpus_trains_no_tokenizer(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"text": ""}\n')
    result = _run("tokenizer", "train", empty, "--vocab-size", "300", "--output", tmp_path / "tok.json")
    assert result.returncode == 2
    assert "empty corpus" in result.stderr
    assert not (tmp_path / "tok.json").exists()
