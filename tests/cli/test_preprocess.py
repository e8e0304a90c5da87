"""``preprocess`` and ``tokenizer train`` as a user types them: output, exit codes, messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data.token_files import read_sidecar


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_ext", *map(str, arguments)]
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
