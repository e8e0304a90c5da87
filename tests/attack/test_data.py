"""Damage to token files and the index cache, and texts that preprocess has to cut: random, seeded."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_ext.data import pieces as module
from megatron_ext.data.index_cache import IndexCache
from megatron_ext.data.loader import TrainLoader
from megatron_ext.data.pieces import pieces
from megatron_ext.data.sources import open_source
from megatron_ext.data.token_files import HEADER, TokenPaths
from megatron_ext.data.verify import verify
from megatron_ext.errors import UserError
from tests.data.corpora import build, documents, run_config, write_tokens
from tests.data.test_index_cache import KEY, _arrays, _check
from tests.data.test_pieces import ALPHABET, TOKENIZER

pytestmark = pytest.mark.slow


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


@pytest.mark.parametrize("sidecar", [True, False])
def test_an_index_with_a_flipped_bit_is_refused(tmp_path: Path, sidecar: bool) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(200), sidecar=sidecar)
    path, chance = TokenPaths.of(prefix).idx, random.Random(1)
    whole = path.read_bytes()
    # Without a checksum, what is read of it: not the document boundaries, which are not used, but for the last.
    end = len(whole) if sidecar else HEADER.size + 12 * 200
    for _ in range(300):
        _flip(path, chance.randrange(end), chance.randrange(8))
        with pytest.raises(UserError):
            open_source(prefix)
        path.write_bytes(whole)


def test_tokens_with_a_flipped_bit_are_found_by_verify(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(200), sidecar=True)
    path, chance = TokenPaths.of(prefix).bin, random.Random(2)
    verify(prefix)
    for _ in range(300):
        at, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        _flip(path, at, bit)
        with pytest.raises(UserError, match=r"corpus\.bin"):
            verify(prefix)
        _flip(path, at, bit)


def test_ids_beyond_the_vocabulary_never_reach_a_batch(tmp_path: Path) -> None:
    prefix = write_tokens(tmp_path / "corpus", documents(300))
    config = run_config({"sources": [{"prefix": prefix}], "split": [90, 10, 0]})
    plan, chance = config.plan(), random.Random(3)
    limit, path = config.model.vocab_size, TokenPaths.of(prefix).bin
    datasets = build(config)
    tokens = np.memmap(path, dtype=np.uint16, mode="r+")
    for _ in range(100):
        at = chance.randrange(len(tokens))
        before, tokens[at] = tokens[at], chance.randrange(limit, 1 << 16)
        refused = False
        with TrainLoader(datasets.train, plan, prefetch=0) as loader:
            for step in plan:
                try:
                    batch = loader.batch(step)
                except UserError as error:
                    assert f"holds the token id {tokens[at]}" in str(error)
                    refused = True
                else:
                    assert max(batch.tokens.max(), batch.labels.max()) < limit
        tokens[at] = before
    assert refused or at >= 0


def test_a_damaged_entry_of_the_index_cache_is_built_again(tmp_path: Path) -> None:
    cache, chance = IndexCache(tmp_path), random.Random(4)
    cache.get(KEY, _arrays)
    for _ in range(300):
        (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
        path = chance.choice(sorted(entry.iterdir()))
        kind = chance.randrange(3)
        if kind == 0:
            path.unlink()
        elif kind == 1:
            path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])
        else:
            _flip(path, chance.randrange(path.stat().st_size), chance.randrange(8))
        _check(cache.get(KEY, _arrays))
        _check(cache.get(KEY, lambda: pytest.fail("built twice")))


def test_random_texts_in_pieces_have_the_ids_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(5)
    parts = [*ALPHABET, "<|endoftext|>", "<|endof", "'", "'", " ", "\n", "'ll", "日"]
    for _ in range(20_000):
        monkeypatch.setattr(module, "PIECE", chance.randrange(1, 12))
        text = "".join(chance.choice(parts) for _ in range(chance.randrange(80)))
        cut = list(pieces(text, TOKENIZER.backend))
        assert "".join(cut) == text
        assert [token for piece in cut for token in TOKENIZER.encode(piece)] == TOKENIZER.encode(text), text


_PREPROCESS = """
import resource, sys
from pathlib import Path
from megatron_ext.data.preprocess import PreprocessOptions, preprocess
resource.setrlimit(resource.RLIMIT_AS, (2_000_000_000, 2_000_000_000))
preprocess((Path(sys.argv[1]),), Path(sys.argv[2]), PreprocessOptions(tokenizer=sys.argv[3]))
"""


def test_a_line_of_50_megabytes_in_two_gigabytes(tmp_path: Path) -> None:
    from megatron_ext.data.tokenizers import save_tokenizer

    save_tokenizer(TOKENIZER, tmp_path / "tok.json")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "' + "the quick brown fox jumps over the lazy dog's back, " * 960_000 + '"}\n')
    arguments = [str(corpus), str(tmp_path / "out"), str(tmp_path / "tok.json")]
    done = subprocess.run([sys.executable, "-c", _PREPROCESS, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    verify(str(tmp_path / "out"))
    shutil.rmtree(tmp_path)
