"""``preprocess`` and ``tokenizer train`` as a user types them: output, exit codes, messages."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_ext.data.token_files import read_sidecar
from megatron_ext.data.tokenizers import load_tokenizer
from tests.cli.conftest import CommandLine

TRAIN = ("tokenizer", "train", "--vocab-size")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be " * 50)
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "to be or not to be"}\n' * 50 + '{"text": "cut\n' + '{"text": "that is"}\n')
    return path


def test_train_a_tokenizer_then_preprocess_with_it(
    tmp_path: Path, text: Path, corpus: Path, command_line: CommandLine
) -> None:
    tokenizer, prefix = tmp_path / "tok.json", tmp_path / "out"
    assert "264 tokens" in command_line(*TRAIN, "264", text, "--output", tokenizer).out

    command = ("preprocess", corpus, "--output", prefix, "--tokenizer", tokenizer, "--workers", "2")
    refused = command_line(*command, code=2)
    assert len(refused.err.splitlines()) == 1
    assert "a.jsonl, line 51: broken JSON" in refused.err
    assert not prefix.with_suffix(".bin").exists()

    done = command_line(*command, "--skip-invalid")
    assert "51 documents" in done.out
    assert "1 invalid records skipped" in done.err
    sidecar = read_sidecar(tmp_path / "out.json")
    assert sidecar is not None
    assert sidecar.documents == 51
    assert "--overwrite" in command_line(*command, "--skip-invalid", code=2).err


def test_missing_tokenizer_file(tmp_path: Path, corpus: Path, command_line: CommandLine) -> None:
    command = ("preprocess", corpus, "--output", tmp_path / "out", "--tokenizer", tmp_path / "no.json")
    assert "no.json: no such file" in command_line(*command, code=2).err


@pytest.mark.parametrize("largest_file", [0, 100])  # bytes of the .bin file; with 100 it fails on the way
def test_full_disk_is_told_and_nothing_is_left(
    tmp_path: Path, text: Path, largest_file: int, command_line: CommandLine
) -> None:
    tokenizer = tmp_path / "tok.json"
    command_line(*TRAIN, "264", text, "--output", tokenizer)
    before = sorted(tmp_path.iterdir())
    limit = f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest_file},) * 2)"
    start = f"import resource, runpy; {limit}; runpy.run_module('megatron_ext', run_name='__main__', alter_sys=True)"
    command = ("preprocess", text, "--output", tmp_path / "out", "--tokenizer", tokenizer)
    result = subprocess.run([sys.executable, "-c", start, *command], capture_output=True, text=True, check=False)
    assert result.returncode == 2, result.stderr
    assert f"error: --output {tmp_path / 'out'}: cannot be written (File too large)" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("command", [(*TRAIN, "264"), ("preprocess", "--tokenizer", "gpt2")], ids=lambda c: c[0])
def test_place_that_cannot_be_written_is_told(
    command: tuple[str, ...], text: Path, corpus: Path, command_line: CommandLine
) -> None:
    message = command_line(*command, text, "--output", corpus / "out", code=2).err
    assert f"{corpus / 'out'}: cannot be written" in message
    assert len(message.splitlines()) == 1


def test_empty_corpus_trains_no_tokenizer_and_a_small_one_fewer_tokens(
    tmp_path: Path, command_line: CommandLine
) -> None:
    corpus, output = tmp_path / "small.jsonl", tmp_path / "tok.json"
    corpus.write_text('{"text": ""}\n')
    assert "empty corpus" in command_line(*TRAIN, "300", corpus, "--output", output, code=2).err
    assert not output.exists()
    corpus.write_text('{"text": "ab"}\n')
    assert "too few repeated pairs" in command_line(*TRAIN, "270", corpus, "--output", output).err


def test_existing_tokenizer_is_kept_unless_overwritten(tmp_path: Path, text: Path, command_line: CommandLine) -> None:
    output = tmp_path / "tok.json"
    output.write_text("mine")
    message = command_line(*TRAIN, "264", text, "--output", output, code=2).err
    assert "tok.json exists" in message
    assert "--overwrite" in message
    assert output.read_text() == "mine"
    command_line(*TRAIN, "264", text, "--output", output, "--overwrite")
    assert load_tokenizer(str(output)).vocab_size == 264
