"""Long texts in pieces: the same ids as the whole, and words that are none."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_ext.data import pieces as module
from megatron_ext.data.pieces import NoBoundaryError, pieces
from megatron_ext.data.preprocess import PreprocessOptions, preprocess
from megatron_ext.data.tokenizers import save_tokenizer, train_tokenizer
from megatron_ext.errors import UserError

# What GPT-2's pattern and the boundaries tell apart, and what looks alike.
ALPHABET = "ab Z's'tll'd 019\n\n\t\r .,!-(<|endoftext|>_\u00a0\u2028\x1c\x1fé日本。、\u0301²½٣\U0001f600ⅷ"
TEXTS = st.lists(st.sampled_from([*ALPHABET, "<|endoftext|>", "  ", "don't", "'re"]), max_size=120).map("".join)
TOKENIZER = train_tokenizer(["the don't 'll 123 (a, b)\n\n  日本。"] * 3, vocab_size=290)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PIECE", 3)


@given(TEXTS)
def test_pieces_have_the_ids_of_the_whole(text: str) -> None:
    cut = list(pieces(text, TOKENIZER.backend))
    assert "".join(cut) == text
    assert [token for piece in cut for token in TOKENIZER.encode(piece)] == TOKENIZER.encode(text)


def test_a_text_is_cut_often() -> None:
    text = "one two, (three)4 日本。five's\n" * 5
    assert len(list(pieces(text, TOKENIZER.backend))) > 20


def _other(change: str) -> Any:
    from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

    backend = Tokenizer.from_str(TOKENIZER.backend.to_str())
    if change == "normalizer":
        backend.normalizer = normalizers.NFC()
    elif change == "prefix":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "no pattern":
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        backend.add_tokens([AddedToken("Z", **{change: True})])
    return backend


@pytest.mark.parametrize("change", ["normalizer", "prefix", "no pattern", "lstrip", "rstrip", "single_word"])
def test_other_tokenizers_get_the_whole(change: str) -> None:
    assert list(pieces("one two three four", _other(change))) == ["one two three four"]


def test_a_word_without_end_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_WORD", 1000)
    assert list(pieces("a" * 1000, TOKENIZER.backend)) == ["a" * 1000]
    with pytest.raises(NoBoundaryError):
        list(pieces("a" * 2000, TOKENIZER.backend))
    save_tokenizer(TOKENIZER, tmp_path / "tok.json")
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("fine", "b " + "a" * 2000, "too")))
    options = PreprocessOptions(tokenizer=str(tmp_path / "tok.json"))
    with pytest.raises(UserError, match=r"c.jsonl, line 2: more than 1,000 characters from character 3 on without"):
        preprocess((corpus,), tmp_path / "out", options)
    skipping = PreprocessOptions(tokenizer=str(tmp_path / "tok.json"), skip_invalid=True, append_eod=False)
    done = preprocess((corpus,), tmp_path / "out", skipping)
    assert (done.documents, done.invalid) == (2, 1)
    assert done.tokens == len(TOKENIZER.encode("fine")) + len(TOKENIZER.encode("too"))
    with pytest.raises(UserError, match="a document has more than 1,000 characters"):
        train_tokenizer(["b " + "a" * 2000], vocab_size=300)


def test_training_in_pieces_gives_the_same_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "the cat's 12 hats, (and) the dog's 345 hats\n\n  日本。 " * 40
    cut = train_tokenizer([text], vocab_size=300).backend.to_str()
    monkeypatch.setattr(module, "PIECE", 1 << 20)
    assert cut == train_tokenizer([text], vocab_size=300).backend.to_str()
