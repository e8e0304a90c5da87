"""The order of samples, by megatron-core's own builders: which documents, where each sample begins, which one is next.

Functions of plain values, so that the index cache can have another process call them.
"""

import logging
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from megatron.core.datasets import helpers
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_ext.data.index_cache import Arrays
from megatron_ext.data.parts import Use

INDEX_ARRAYS: Final = ("documents", "samples", "shuffle")
"""Document of each turn [turns]; turn and offset where a sample begins [samples + 1, 2]; order of samples [samples]."""


@dataclass(frozen=True)
class IndexRequest:
    """Of which documents an index is made, and how."""

    prefix: str
    first: int
    end: int
    """Documents [first, end) of the corpus."""

    use: Use
    samples: int
    """At least so many; the index holds whole passes over the documents."""

    seq_len: int
    seed: int


@dataclass(frozen=True)
class _Vocabulary:
    """What GPTDataset asks of a tokenizer. It has no padding token: whole samples are never padded."""

    vocab_size: int
    eod: int = 0  # read for masks alone, of which there are none
    unique_identifiers: str = ""


def build_index(request: IndexRequest) -> Arrays:
    """Arrays of ``INDEX_ARRAYS`` for one corpus."""
    # It warns that it was given no place to save the index; the cache is the place.
    logger = logging.getLogger(GPTDataset.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        built = GPTDataset(
            IndexedDataset(request.prefix),
            request.prefix,
            np.arange(request.first, request.end, dtype=np.int32),
            request.samples,
            Split[request.use],
            gpt_config(request.seq_len, request.seed),
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
