"""Training and validation samples: megatron-core's GPTDataset over checked corpora, blended by weight.

What departs from megatron-core: the index is built by whichever process comes first and does not need
torch.distributed (its own code builds on rank 0 and lets the others fail where they do not see rank 0's disk), and the
part of a sample that a step uses is read alone, without the masks and positions that this project does not use.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_ext.config.data import DataConfig
from megatron_ext.data.index_cache import Arrays, IndexCache
from megatron_ext.data.sources import Part, Use, index_cache, open_parts

# Validation samples are the same ones whatever the run's seed, so that runs with different seeds compare.
_VALIDATION_SEED = 1234

INDEX_ARRAYS: Final = ("documents", "samples", "shuffle")
"""Document of each turn [turns]; turn and offset where a sample begins [samples + 1, 2]; order of samples [samples]."""


@dataclass(frozen=True)
class _Vocabulary:
    """What GPTDataset asks of a tokenizer. It has no padding token: whole samples are never padded."""

    vocab_size: int
    eod: int = 0  # read for masks alone, of which there are none
    unique_identifiers: str = ""


def build_index(prefix: str, *, first: int, end: int, use: Use, samples: int, seq_len: int, seed: int) -> Arrays:
    """``INDEX_ARRAYS`` of at least ``samples`` samples, by megatron-core, in whole passes over documents [first, end).

    Takes plain values alone, so that the index cache can have another process call it.
    """
    # It warns that it was given no place to save the index; the cache is the place.
    logger = logging.getLogger(GPTDataset.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        built = GPTDataset(
            IndexedDataset(prefix),
            prefix,
            np.arange(first, end, dtype=np.int32),
            samples,
            Split[use],
            gpt_config(seq_len, seed),
        )
    finally:
        logger.setLevel(level)
    return dict(zip(INDEX_ARRAYS, (built.document_index, built.sample_index, built.shuffle_index), strict=True))


def build_blend(weights: list[float], samples: int) -> Arrays:
    """Corpus of each sample and number of the sample in it [samples], with the shares ``weights``, whose sum is 1."""
    part_of, index_of = np.zeros(samples, dtype=np.int16), np.zeros(samples, dtype=np.int64)
    helpers.build_blending_indices(part_of, index_of, weights, len(weights), samples, False)
    return {"part_of": part_of, "index_of": index_of}


def gpt_config(seq_len: int, seed: int) -> Any:
    """Settings of a GPTDataset of whole samples, without masks."""
    return GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        split="1,0,0",
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        drop_last_partial_validation_sequence=True,
        add_extra_token_to_sequence=True,
        tokenizer=_Vocabulary(vocab_size=0),
    )


class Samples(Protocol):
    """What the loaders read from."""

    @property
    def seq_len(self) -> int:
        """Tokens of a full sequence."""

    @property
    def vocab_size(self) -> int:
        """Every id has to be below it; the loaders check what they have read."""

    def __len__(self) -> int:
        """Samples there are."""

    def check_files(self) -> None:
        """Raise UserError where a file has become too short to read; called before each batch."""

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        """Token ids [first, first + count) of sample ``index``, of the seq_len + 1 it has.

        The last one is there for the labels; it is also the first one of the sample that follows in the corpus.
        """


@dataclass(frozen=True)
class Datasets:
    """What a run trains and validates on."""

    train: Samples
    """As many samples as the plan draws, passing over the corpus as often as that takes."""

    valid: Samples
    """``validation.samples`` samples, or fewer where the validation documents hold fewer without repetition."""


class GPTSamples(GPTDataset):  # type: ignore[misc]
    """megatron-core's GPTDataset with its index in an :class:`IndexCache`."""

    def __init__(
        self, part: Part, *, samples: int, seq_len: int, vocab_size: int, seed: int, cache: IndexCache
    ) -> None:
        self._part, self._source, self.vocab_size = part, part.source, vocab_size
        self.prefix, self.check_files = part.source.prefix, part.source.check_files
        # A plain array over the mapping: numpy's memmap class makes every slice slow.
        self._tokens = np.asarray(np.memmap(part.source.opened[0][0], dtype=part.source.dtype, mode="r"))
        self._cache = cache
        self._key = {
            "kind": "gpt samples",
            "format": 1,
            "megatron_core": version("megatron-core"),
            # The index follows from the documents' lengths, which are in the .idx file; the ids do not matter.
            "idx_sha256": part.source.idx_sha256,
            "documents": [part.first, part.end],
            "use": part.use,
            "seq_len": seq_len,
            "samples": samples,
            "seed": seed,
        }
        super().__init__(
            IndexedDataset(part.source.prefix),
            part.source.prefix,
            np.arange(part.first, part.end, dtype=np.int32),
            samples,
            Split[part.use],
            gpt_config(seq_len, seed),
        )
        assert len(self.shuffle_index) >= samples

    def __len__(self) -> int:
        """Samples asked for; the index may hold more, since it is made in whole passes over the documents."""
        return int(self.num_samples)

    @property
    def seq_len(self) -> int:
        """Tokens of a full sequence."""
        return int(self.config.sequence_length)

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        """Token ids [first, first + count) of sample ``index``; may be a view of the file.

        Touches only the documents that hold these tokens: at short lengths this takes less than a quarter of the time
        of GPTDataset's own way, which puts the whole sample together (benchmarks/bench_loader.py).
        """
        # Shuffled sample -> place in the corpus as megatron-core ordered it: a turn, and a token of its document.
        row = self.shuffle_index[index]
        turn, offset = int(self.sample_index[row, 0]), int(self.sample_index[row, 1]) + first
        source = self._source
        pieces: list[npt.NDArray[np.integer[Any]]] = []
        while True:
            document = self.document_index[turn]
            length = int(source.lengths[document])
            if offset < length:
                start = int(source.positions[document]) // source.dtype.itemsize + offset
                piece = self._tokens[start : start + min(length - offset, count)]
                count -= len(piece)
                # Most reads end in the document they begin in: no copy then, the caller copies into its batch.
                if not count and not pieces:
                    return piece
                pieces.append(piece)
                if not count:
                    return np.concatenate(pieces)
            # A sample goes on with the document of the next turn; ``first`` may also pass over whole documents.
            turn, offset = turn + 1, max(0, offset - length)

    def _build_document_sample_shuffle_indices(self) -> tuple[npt.NDArray[Any], ...]:
        part, seq_len = self._part, self.seq_len
        build = partial(
            build_index,
            part.source.prefix,
            first=part.first,
            end=part.end,
            use=part.use,
            samples=len(self),
            seq_len=seq_len,
            seed=int(self.config.random_seed),
        )
        # Turns by the mean length of a document, and three numbers a sample; counting the part's tokens would read all
        # of its lengths, also where the index is there.
        turns = max(part.end - part.first, len(self) * seq_len * part.source.documents // part.source.tokens)
        arrays = self._cache.get(self._key, build, elements=turns + 3 * len(self))
        return tuple(arrays[name] for name in INDEX_ARRAYS)


@dataclass(frozen=True)
class Blend:
    """Samples of several corpora by weight, in the order of megatron-core's BlendedDataset."""

    parts: tuple[Samples, ...]
    """One per corpus."""

    part_of: npt.NDArray[np.int16]
    """Corpus of each sample [samples]."""

    index_of: npt.NDArray[np.int64]
    """Sample of that corpus [samples]."""

    @property
    def seq_len(self) -> int:
        """Tokens of a full sequence."""
        return self.parts[0].seq_len

    @property
    def vocab_size(self) -> int:
        """Every id has to be below it."""
        return self.parts[0].vocab_size

    def __len__(self) -> int:
        return len(self.part_of)

    def check_files(self) -> None:
        """Raise UserError where a file has become too short to read."""
        for part in self.parts:
            part.check_files()

    def read(self, index: int, first: int, count: int) -> npt.NDArray[np.integer[Any]]:
        """Token ids [first, first + count) of sample ``index``."""
        return self.parts[int(self.part_of[index])].read(int(self.index_of[index]), first, count)


def build_datasets(
    data: DataConfig, *, seq_len: int, vocab_size: int, samples: int, valid_samples: int, seed: int
) -> Datasets:
    """Open, check, split and blend the corpora of ``data``.

    Needs no process group and gives every rank the same samples; ranks may call it at once.

    Args:
        data: The corpora.
        seq_len: Tokens of a full sample.
        vocab_size: Every token id has to be below it.
        samples: Training samples: as many as the plan draws.
        valid_samples: Validation samples, at most: none of them comes twice. They are the same ones for every seed.
        seed: Decides the order of the training samples.

    Raises:
        UserError: as :func:`megatron_ext.data.sources.check_data` does.
    """
    cache = index_cache(data)
    train, valid = open_parts(data, ("train", "valid"), seq_len=seq_len, vocab_size=vocab_size, cache=cache)
    return Datasets(
        train=_build(train, samples=samples, seq_len=seq_len, vocab_size=vocab_size, seed=seed, cache=cache),
        valid=_build_valid(valid, samples=valid_samples, seq_len=seq_len, vocab_size=vocab_size, cache=cache),
    )


def build_training(data: DataConfig, *, seq_len: int, vocab_size: int, samples: int, seed: int) -> Samples:
    """The training samples of :func:`build_datasets` alone. Raises as it does."""
    cache = index_cache(data)
    (parts,) = open_parts(data, ("train",), seq_len=seq_len, vocab_size=vocab_size, cache=cache)
    return _build(parts, samples=samples, seq_len=seq_len, vocab_size=vocab_size, seed=seed, cache=cache)


def _build_valid(parts: Sequence[Part], *, samples: int, seq_len: int, vocab_size: int, cache: IndexCache) -> Samples:
    total = sum(part.weight for part in parts)
    # As many samples of each corpus as it has without a second pass.
    without_repeats = min(int(part.samples(seq_len) * total / part.weight) for part in parts)
    samples = max(1, min(samples, without_repeats))
    return _build(parts, samples=samples, seq_len=seq_len, vocab_size=vocab_size, seed=_VALIDATION_SEED, cache=cache)


def _build(
    parts: Sequence[Part], *, samples: int, seq_len: int, vocab_size: int, seed: int, cache: IndexCache
) -> Samples:
    if len(parts) == 1:
        return GPTSamples(parts[0], samples=samples, seq_len=seq_len, vocab_size=vocab_size, seed=seed, cache=cache)
    weights = np.array([part.weight for part in parts]) / sum(part.weight for part in parts)

    key = {"kind": "blend", "weights": weights.tolist(), "samples": samples}
    # A look at every corpus for every sample.
    arrays = cache.get(key, partial(build_blend, weights.tolist(), samples), elements=samples * len(parts))
    counts = np.bincount(arrays["part_of"], minlength=len(parts))
    members = tuple(
        # A corpus of tiny weight may have no turn; its dataset still needs one sample to exist.
        GPTSamples(part, samples=max(1, int(count)), seq_len=seq_len, vocab_size=vocab_size, seed=seed, cache=cache)
        for part, count in zip(parts, counts, strict=True)
    )
    return Blend(parts=members, part_of=arrays["part_of"], index_of=arrays["index_of"])
