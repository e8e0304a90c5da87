"""``tokenizer train``: existing files are kept, sizes are checked, help has an example."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_ext.cli.tokenizer import tokenizer_app
from megatron_ext.data.tokenizers import load_tokenizer
from megatron_ext.errors import UserError


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("to be or not to be " * 50)
    return path


def _train(text: Path, output: Path, *more: str) -> str:
    arguments = ["train", str(text), "--vocab-size", "270", "--output", str(output), *more]
    return CliRunner().invoke(tokenizer_app, arguments, catch_exceptions=False).output


def test_existing_file_is_kept_unless_overwritten(tmp_path: Path, text: Path) -> None:
    output = tmp_path / "tok.json"
    output.write_text("mine")
    with pytest.raises(UserError, match=r"tok\.json exists.*--overwrite"):
        _train(text, output)
    assert output.read_text() == "mine"
    _train(text, output, "--overwrite")
    assert load_tokenizer(str(output)).encode("to be") == load_tokenizer(str(output)).encode("to be")


def test_smaller_vocabulary_than_asked_for_is_said(tmp_path: Path, text: Path) -> None:
    text.write_text("ab")
    assert "too few repeated pairs" in _train(text, tmp_path / "tok.json")


def test_help_has_an_example() -> None:
    assert "Example:" in CliRunner().invoke(tokenizer_app, ["train", "--help"]).output
